"""Pairs of low and high quality pictures: the shard format, reading shards for training, held-out pairs for scoring; prep/ makes the shards.

May import `config`, `degradation`, `imaging` and `util`.
"""
