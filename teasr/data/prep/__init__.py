"""From folders of photographs to shards of degraded pairs: which photographs, which crops, on how many processes; and checking a finished set.

Nothing here imports torch, since many processes do this work. May import `config`, `degradation`, `imaging`, `util` and the shard format.
"""
