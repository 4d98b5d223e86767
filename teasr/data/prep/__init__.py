"""Make shards of LQ/HQ pairs from folders of photographs, on any number of processes, and verify a finished set.

Nothing here imports torch, because many processes run this code. This folder may import `config`, `degradation`,
`imaging`, `util` and the shard format.
"""
