"""Shared utilities: atomic files, checkpoint folders, progress, seeded random numbers, ranks, memory and FLOPs.

This folder imports nothing else from teasr.
"""
