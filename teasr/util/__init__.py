"""Small things that everything else uses: whole-or-absent files, checkpoint folders, progress, random numbers by name, ranks, memory.

Imports nothing else of teasr.
"""
