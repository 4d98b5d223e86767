"""Verify a shard set: counts, hashes, decoding, LQ degraded again from its record.

This module reads the tars itself and does not import torch, so that every core can check a shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from teasr import degradation
from teasr.data.layout import CAPTION, DEFAULT_SCALE, INDEX, lq_field, parse_index, sample_key, set_hash, special_kind
from teasr.data.prep import engines
from teasr.data.prep.making import HQ_SUFFIX, libraries
from teasr.imaging import images
from teasr.util.files import read_json, unusual
from teasr.util.progress import ProgressLine
from teasr.util.seed import seed_of

REMAKE = "delete it and run the same `teasr prepare` command again"


@dataclass(frozen=True)
class ShardCheck:
    """One shard to check: its row in the index, and which samples to decode and to degrade again."""

    folder: str
    row: dict
    settings: dict
    libraries: tuple[dict, ...]
    first: int  # number of the shard's first sample in the set
    decode: tuple[int, ...]
    redo: tuple[int, ...]

    @property
    def path(self) -> Path:
        """Path of the tar."""
        return Path(self.folder) / self.row["shard"]


def read_index(folder: Path) -> dict:
    """Read the index of a local set. Raises ValueError when it is missing, broken, or not that of a set of images."""
    if ":" in folder.parts[0]:  # a URL: `Path` turned s3:// into s3:/
        raise ValueError(f"{folder}: only a local folder can be verified; copy the set to this machine first")
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder that contains {INDEX}")
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} holds no {INDEX}: the set is not finished; run its `teasr prepare` command again")
    try:
        index = parse_index((folder / INDEX).read_bytes())
    except ValueError as error:
        raise ValueError(f"{folder / INDEX} is broken ({error}): run its `teasr prepare` command again") from None
    _check_is_of_images(folder, index)
    return index


def _check_is_of_images(folder: Path, index: dict) -> None:
    settings = index.get("settings", {})
    if not any(row["nsamples"] for row in index["shards"]):
        raise ValueError(f"{folder} holds no samples: run its `teasr prepare` command again")
    if "codec_sha256" in settings:
        raise ValueError(f"{folder} holds cached latents: give the folder of the shards that they were made from")
    lacking = {"crop_px", "degradation", "hq_format", "peer_exact", "variants"} - set(settings)
    lacking |= {"libraries", "set_sha256"} - set(index)
    if lacking or not all(isinstance(row.get("sha256"), str) for row in index["shards"]):
        what = ", ".join(sorted(lacking)) or "sha256 of a shard"
        raise ValueError(f"{folder / INDEX} is broken ({what} is missing): run its `teasr prepare` command again")
    if settings["hq_format"] not in HQ_SUFFIX or type(settings["crop_px"]) is not int:
        raise ValueError(
            f"{folder / INDEX} is broken (its settings are not known): run its `teasr prepare` command again"
        )


def verify_set(folder: Path, share: float, redo: int, workers: int) -> tuple[list[str], list[str], dict]:
    """Check a whole set; return (problems, warnings, index).

    `share` is the fraction of the samples to decode, `redo` the number of samples to degrade again. Raises ValueError
    when the set has no valid index.
    """
    index = read_index(folder)
    problems, warnings = _check_index(folder, index)
    specs, first = [], 0
    total = max(1, sum(row["nsamples"] for row in index["shards"]))
    again = set(np.linspace(0, total - 1, min(redo, total)).round().astype(int).tolist()) if redo else set()
    for row in index["shards"]:
        n = row["nsamples"]
        chosen = np.random.default_rng(seed_of("verify", row["shard"])).permutation(n)[: max(1, round(share * n))]
        redone = tuple(i - first for i in sorted(again) if first <= i < first + n)
        picked = tuple(sorted({*chosen.tolist(), *redone}))
        specs.append(ShardCheck(str(folder), row, index["settings"], tuple(index["libraries"]), first, picked, redone))
        first += n
    with ProgressLine("verify", sum(len(s.decode) for s in specs), "samples") as line:
        found = engines.run(verify_shard, specs, "local", workers, line.add)
    return problems + [problem for rows in found for problem in rows], warnings, index


def _check_index(folder: Path, index: dict) -> tuple[list[str], list[str]]:
    rows = index["shards"]
    problems = []
    if set_hash(rows) != index["set_sha256"]:
        problems.append(
            f"{INDEX}: set_sha256 is not the hash of the listed shards: run the same `teasr prepare` command again"
        )
    known = {row["shard"] for row in rows} | {Path(row["shard"]).with_suffix(".json").name for row in rows}
    strays = [
        p.name
        for p in folder.iterdir()
        if p.name.endswith(".tmp") or (p.name.startswith("shard-") and p.name not in known)
    ]
    return problems, [f"{name} does not belong to the set" for name in sorted(strays)]


def verify_shard(check: ShardCheck, on_done: Callable[[int], None] = lambda samples: None) -> list[str]:
    """List the problems of one shard, one line each; `on_done(n)` is called each time n more samples are decoded."""
    name, row = check.row["shard"], check.row
    reason = unusual(check.path)
    if reason:
        on_done(len(check.decode))
        return [f"{name} cannot be read ({reason.removeprefix('file cannot be read: ')}): {REMAKE}"]
    size = check.path.stat().st_size
    with open(check.path, "rb") as file:
        data = file.read(min(size, 2 * row["bytes"] + 2**16))  # a file that is far too large may not fit into memory
    problems = [f"{name}/{member} is {kind}, not a plain file: {REMAKE}" for member, kind in special_members(data)]
    if size != row["bytes"]:
        problems.append(f"{name} has {size} bytes, {INDEX} says {row['bytes']}: {REMAKE}")
    elif hashlib.sha256(data).hexdigest() != row["sha256"]:
        problems.append(f"{name} is corrupted (its sha256 differs from {INDEX}): {REMAKE}")
    if read_json(check.path.with_suffix(".json")) != row:
        problems.append(f"{name}: its manifest {check.path.stem}.json is missing or differs from {INDEX}: {REMAKE}")
    try:
        samples = list(read_samples(data))
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        on_done(len(check.decode))
        return [*problems, f"{name} cannot be read to its end ({error}): {REMAKE}"]
    problems += _check_keys(check, [key for key, _ in samples])
    for i in check.decode:
        if i < len(samples):
            key, members = samples[i]
            problems += [
                f"{name}/{problem}: {REMAKE}" for problem in check_sample(check, key, members, i in check.redo)
            ]
        on_done(1)
    return problems


def read_samples(data: bytes) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (key, members) in the order of the tar.

    A key appears twice when its members are not adjacent. Members that are not plain files are left out
    (`special_members`). Raises TarError when the tar is truncated or a member appears twice.
    """
    key, members = "", {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for info in (info for info in tar if not special_kind(info)):
            this, _, field = info.name.partition(".")
            if this != key and key:
                yield key, members
                members = {}
            key = this
            if field in members:
                raise tarfile.TarError(f"{info.name} appears twice")
            members[field] = tar.extractfile(info).read()
        if data[tar.offset : tar.offset + 512].strip(b"\0") or len(data) < tar.offset:
            raise tarfile.TarError("it is truncated")
    if key:
        yield key, members


def special_members(data: bytes) -> list[tuple[str, str]]:
    """(name, kind) of the members of a tar that are not plain files, such as links; those that can be read."""
    found = []
    with contextlib.suppress(tarfile.TarError, EOFError), tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for info in tar:
            if kind := special_kind(info):
                found.append((info.name, kind))
    return found


def _check_keys(check: ShardCheck, keys: list[str]) -> list[str]:
    wanted = [sample_key(check.first + i) for i in range(check.row["nsamples"])]
    if keys == wanted:
        return []
    name, twice = check.row["shard"], sorted(key for key, times in Counter(keys).items() if times > 1)
    lost, foreign = sorted(set(wanted) - set(keys)), sorted(set(keys) - set(wanted))
    problems = [f"{name}/{key} appears twice: {REMAKE}" for key in twice]
    problems += [f"{name}/{key} is missing: {REMAKE}" for key in lost]
    problems += [f"{name}/{key} does not belong to this shard: {REMAKE}" for key in foreign]
    return problems or [f"{name}: its samples are out of order: {REMAKE}"]


def check_sample(check: ShardCheck, key: str, members: dict[str, bytes], redo: bool = False) -> list[str]:
    """List the problems of one sample, each beginning with the name of the member."""
    settings = check.settings
    hq_field = f"hq.{HQ_SUFFIX[settings['hq_format']]}"
    lq_fields = [lq_field(v) for v in range(settings["variants"])]
    side, problems, pictures = settings["crop_px"], [], {}
    wanted = {hq_field: side} | dict.fromkeys(lq_fields, side // settings.get("scale", DEFAULT_SCALE))
    try:
        record = json.loads(members["json"])
        sums = dict(record["crc32"])
    except (KeyError, ValueError, TypeError, RecursionError):
        return [f"{key}.json is missing or broken"]
    texts = [CAPTION] if settings.get("captions", "none") == "files" else []
    for field in (*wanted, *texts):
        if field not in members:
            problems.append(f"{key}.{field} is missing")
        elif zlib.crc32(members[field]) != sums.get(field):
            problems.append(f"{key}.{field} is corrupted (its crc32 differs from the recorded one)")
        elif px := wanted.get(field):
            try:
                pictures[field] = x = images.decode_rgb(members[field], field)
                if x.shape[:2] != (px, px):
                    problems.append(f"{key}.{field} is {x.shape[1]}x{x.shape[0]} px, it must be {px}x{px}")
            except ValueError as error:
                problems.append(f"{key}.{error}")
    problems += [
        f"{key}.{field} does not belong to this sample" for field in sorted(set(members) - {*wanted, *texts, "json"})
    ]
    if redo and not problems and hq_field != "hq.jpg":
        try:
            problems += _redo(check, key, pictures[hq_field], [pictures[f] for f in lq_fields], record)
        except (KeyError, ValueError, TypeError, IndexError) as error:
            problems.append(f"{key}.json has a broken record of the degradation ({error!r})")
    return problems


def _redo(check: ShardCheck, key: str, hq: np.ndarray, lq: list[np.ndarray], record: dict) -> list[str]:
    """Degrade the stored HQ again with the recorded seeds; parameters and pixels must be identical."""
    names = check.settings
    settings = degradation.preset(names["degradation"], names["peer_exact"], names.get("scale", DEFAULT_SCALE))
    problems = []
    for variant, drawn in enumerate(record.get("degradation", [])):
        again, parameters = degradation.degrade(hq, settings, np.random.default_rng(drawn["seed"]))
        if not np.array_equal(again, lq[variant]) or {"seed": drawn["seed"]} | parameters != drawn:
            other = libraries() not in check.libraries
            why = f" (the shards were made with other library versions: {check.libraries})" if other else ""
            problems.append(f"{key}.{lq_field(variant)} is different when HQ is degraded again{why}")
    return problems
