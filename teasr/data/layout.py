"""The format of a shard set, shared by the writer, the reader and the verifier.

index.json              config, sources, skipped images, and the size, number of samples and hash of each shard
shard-000000.tar        {key}.hq.png|webp|jpg  {key}.lq.png [{key}.lq.1.png ..]  {key}.json
shard-000000.json       the shard's manifest; a tar without a manifest is incomplete
README.md               data card: sources and licences of the photographs
latents/                sidecar shards with the same keys (see latents.py)
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from teasr.util.files import Hashed, write_atomic

FORMAT = 2
SCALES = (1, 2, 3, 4)  # ratio of the side of HQ to that of LQ
DEFAULT_SCALE = 4  # of sets whose index does not name a scale, because they were made before it was a setting
INDEX = "index.json"


def shard_name(shard: int) -> str:
    """File name of a shard, from its number."""
    return f"shard-{shard:06d}.tar"


def sample_key(sample: int) -> str:
    """Key of a sample, from its number. It contains no dot, because webdataset splits names at the first one."""
    return f"{sample:09d}"


def lq_field(variant: int) -> str:
    """Member name of a degraded variant within its sample."""
    return "lq.png" if variant == 0 else f"lq.{variant}.png"


def commit_shard(path: Path, keys: list[str], file: Hashed, identity: str, **more: object) -> dict:
    """Write the manifest of the shard at `path`, which marks the shard as finished, and return it."""
    manifest = {
        "shard": path.name,
        "nsamples": len(keys),
        "bytes": file.bytes,
        "sha256": file.sha256.hexdigest(),
        "first_key": keys[0],
        "last_key": keys[-1],
        "identity": identity,
    } | more
    write_atomic(path.with_suffix(".json"), json.dumps(manifest, indent=1).encode())
    return manifest


def set_hash(rows: list[dict]) -> str:
    """Hash of a shard set, computed from its manifests."""
    return hashlib.sha256("".join(row["sha256"] for row in rows).encode()).hexdigest()


def commit(folder: Path, index: dict) -> None:
    """Write the index, which marks the set as complete, and delete the shards left over from an earlier set."""
    write_atomic(folder / INDEX, json.dumps(index, indent=1).encode())
    wanted = {row["shard"] for row in index["shards"]}
    for stale in folder.glob("shard-*.tar"):
        if stale.name not in wanted:
            stale.unlink()
            stale.with_suffix(".json").unlink(missing_ok=True)


def read_manifest(path: Path, identity: str) -> dict | None:
    """Return the manifest of the finished shard `path`; None if it is missing, truncated, or has another identity."""
    try:
        manifest = json.loads(path.with_suffix(".json").read_text())
        if manifest["identity"] == identity and path.stat().st_size == manifest["bytes"]:
            return manifest
    except (OSError, ValueError, KeyError, TypeError):
        pass  # missing or incomplete: the shard will be made again
    return None
