"""Sidecar shards: what was computed once from the shards of a set, such as latents, one sidecar for each shard.

<out>/shard-000000.tar    the sidecar of the shard of the same name
<out>/shard-000000.json   its manifest, as in layout.py, with the hash of the shard it was made from
<out>/index.json          index, as in layout.py; it is written last and marks the sidecars as complete
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from teasr.data.shards import ShardSet, read_index, read_shard, url_of


@dataclass(frozen=True)
class Sidecars:
    """The opened indices of the sidecars of one or several sets. `urls`: one for each shard, in the same order."""

    location: str
    urls: tuple[str, ...]
    indices: tuple[dict[str, Any], ...]

    def read(self, shard: int, member: str) -> dict[str, bytes]:
        """Return a member of every sample in the sidecar of a shard, by key. Raises ValueError if it is unreadable."""
        return {raw["__key__"]: raw.get(member, b"") for raw in read_shard(self.urls[shard])}


def open_sidecars(
    key: str, locations: tuple[str, ...], shards: ShardSet, command: str, check: Callable[[str, dict], None]
) -> Sidecars:
    """Open the sidecars of the sets that `shards` joins, one location for each set, in the same order.

    key: the config key that names the locations. command: the verb that makes them. check(location, index): raises
    ValueError for an index of something else. Raises ValueError when sidecars are missing or belong to other shards.
    """
    sets = shards.locations
    if len(locations) != len(sets):
        raise ValueError(
            f"{key} names {len(locations)} folder(s) and data.shards {len(sets)}: give one for each, in the same order"
        )
    urls, indices = [], []
    for location, source in zip(locations, sets, strict=True):
        index = read_index(location, f"make it with `{command} shards={source}`")
        check(location, index)
        made_from = {row["shard"]: row.get("source_sha256") for row in index["shards"]}
        wanted = shards.hashes_of(source)
        if made_from != wanted:
            name = min(k for k in made_from.keys() | wanted.keys() if made_from.get(k) != wanted.get(k))
            raise ValueError(
                f"{key} = {location} was made from other shards than those in {source} ({name} differs): run "
                f"`{command}` again with shards={source}"
            )
        urls += [url_of(location, name) for name in wanted]
        indices.append(index)
    return Sidecars(" + ".join(locations), tuple(urls), tuple(indices))
