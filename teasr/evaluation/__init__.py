"""Scoring restored pictures: metrics, the protocols of published tables, a model on a whole set of pairs.

May import `data`, `diffusion`, `imaging` and `util`.
"""
