"""The format of a shard set, shared by the writer, the reader and the verifier.

index.json              config, sources, skipped images, and the size, number of samples and hash of each shard
shard-000000.tar        {key}.hq.png|webp|jpg  {key}.lq.png [{key}.lq.1.png ..]  [{key}.txt]  {key}.json
shard-000000.json       the shard's manifest; a tar without a manifest is incomplete
README.md               data card: sources and licences of the photographs
latents/, captions/     sidecar shards (see latents.py, captions.py)
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

from teasr.util.files import Hashed, read_json, write_atomic

FORMAT = 2
SCALES = (1, 2, 3, 4)  # ratio of the side of HQ to that of LQ
DEFAULT_SCALE = 4  # of sets whose index does not name a scale, because they were made before it was a setting
INDEX = "index.json"
CAPTION = "txt"  # member name of the caption of a sample, if it has one
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")  # what a shard may be called: the name becomes part of commands
MOST = {"nsamples": 10**6, "bytes": 2**50}  # in one shard; more is a mistake that would fill the memory


def shard_name(shard: int) -> str:
    """File name of a shard, from its number."""
    return f"shard-{shard:06d}.tar"


def sample_key(sample: int) -> str:
    """Key of a sample, from its number. It contains no dot, because webdataset splits names at the first one."""
    return f"{sample:09d}"


def lq_field(variant: int) -> str:
    """Member name of a degraded variant within its sample."""
    return "lq.png" if variant == 0 else f"lq.{variant}.png"


def parse_index(text: str | bytes) -> dict:
    """Parse an index and check the values that all readers rely on.

    An index may come from anywhere, and its shard names become parts of paths and commands. Raises ValueError that
    says what is wrong.
    """
    try:
        index = json.loads(text)
        if index["format"] != FORMAT:
            raise ValueError(f"it has format {index['format']}, this version reads {FORMAT}: make the shards again")
        _check_settings(index.get("settings", {}))
        for row in index["shards"]:
            _check_row(row)
        twice = [name for name, times in Counter(row["shard"] for row in index["shards"]).items() if times > 1]
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its content is not that of an index: {error!r}") from None
    if twice:
        raise ValueError(f"it lists {twice[0]} twice")
    return index


def _check_settings(settings: dict) -> None:
    scale, variants = settings.get("scale", DEFAULT_SCALE), settings.get("variants", 1)
    if scale not in SCALES or type(variants) is not int or variants < 1:
        raise ValueError(f"its settings have scale = {scale!r} and variants = {variants!r}")


def _check_row(row: dict) -> None:
    name = row["shard"]
    if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
        raise ValueError(
            f"the shard name {name!r} is not a plain file name of letters, digits, '.', '_' and '-', which starts with "
            "a letter, a digit or '_'"
        )
    for key, most in MOST.items():
        if type(row[key]) is not int or not 0 <= row[key] <= most:
            raise ValueError(f"{name} has {key} = {row[key]!r}: must be a whole number from 0 to {most}")


def special_kind(info: tarfile.TarInfo) -> str:
    """What a member of a tar is if it is not a plain file, which all members of a shard are; empty for a plain file.

    A sparse file counts as special, because it may be far larger than the tar that holds it.
    """
    kinds = {
        "a symbolic link": info.issym(), "a hard link": info.islnk(), "a folder": info.isdir(),
        "a named pipe": info.isfifo(), "a device": info.isdev(), "a sparse file": info.issparse(),
        "of an unknown type": not info.isreg(),
    }  # fmt: skip
    return next((kind for kind, true in kinds.items() if true), "")


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
    manifest = read_json(path.with_suffix(".json"))
    if manifest.get("identity") != identity or not {"shard", "nsamples", "sha256", "libraries"} <= manifest.keys():
        return None
    return manifest if path.is_file() and path.stat().st_size == manifest.get("bytes") else None
