"""Scoring restored pictures: metrics, the protocols of published tables, evaluation on whole sets, and reports.

May import `config`, `data`, `diffusion`, `imaging`, `util`, and, to score a model, `restore` and `tracking`.
"""
