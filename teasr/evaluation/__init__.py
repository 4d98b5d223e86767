"""Scoring restored pictures: metrics, the protocols of published tables, and evaluation on whole sets of pairs.

May import `data`, `diffusion`, `imaging` and `util`.
"""
