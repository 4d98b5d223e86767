"""The format of a shard set: what writer, reader and verifier agree on.

index.json              settings, sources, skipped pictures, and for each shard its size, samples and hash
shard-000000.tar        {key}.hq.png|webp|jpg  {key}.lq.png [{key}.lq.1.png ..]  {key}.json
shard-000000.json       the shard's manifest; a tar without it was interrupted
README.md               data card: where the photographs come from and under which licences
latents/ ..             sidecar sets with the same keys
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from teasr.util.files import Hashed, write_atomic

FORMAT = 2
INDEX = "index.json"


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"shard-{shard:06d}.tar"


def sample_key(sample: int) -> str:
    """Key of a sample: webdataset cuts names at the first dot, so it holds none."""
    return f"{sample:09d}"


def lq_field(variant: int) -> str:
    """Name of a degraded variant inside its sample."""
    return "lq.png" if variant == 0 else f"lq.{variant}.png"


def commit_shard(path: Path, keys: list[str], file: Hashed, identity: str, **more: object) -> dict:
    """Write the manifest of a shard that lies at `path`, which makes it finished; returns it."""
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
    """Hash of a set from its manifests."""
    return hashlib.sha256("".join(row["sha256"] for row in rows).encode()).hexdigest()


def commit(folder: Path, index: dict) -> None:
    """Write the index, which makes the set whole, and drop the shards that an earlier set left behind."""
    write_atomic(folder / INDEX, json.dumps(index, indent=1).encode())
    wanted = {row["shard"] for row in index["shards"]}
    for stale in folder.glob("shard-*.tar"):
        if stale.name not in wanted:
            stale.unlink()
            stale.with_suffix(".json").unlink(missing_ok=True)


def read_manifest(path: Path, identity: str) -> dict | None:
    """The manifest beside a finished shard `path`; None when it is missing, torn, or of other settings."""
    try:
        manifest = json.loads(path.with_suffix(".json").read_text())
        if manifest["identity"] == identity and path.stat().st_size == manifest["bytes"]:
            return manifest
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there yet, or interrupted: made again
    return None
