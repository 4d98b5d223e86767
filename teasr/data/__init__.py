"""LQ/HQ pairs: the shard format, reading shards for training, and held-out pairs for evaluation.

prep/ makes the shards. This folder may import `config`, `degradation`, `imaging` and `util`.
"""
