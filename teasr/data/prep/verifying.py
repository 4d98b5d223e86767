"""Verify a shard set (counts, hashes, decoding, LQ degraded again from its record), and draw a contact sheet.

This module reads the tars itself and does not import torch, so that every core can check a shard.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from teasr import degradation
from teasr.data.layout import DEFAULT_SCALE, FORMAT, INDEX, lq_field, sample_key, set_hash
from teasr.data.prep import engines
from teasr.data.prep.making import HQ_SUFFIX, libraries
from teasr.imaging import images
from teasr.util.progress import ProgressLine
from teasr.util.seed import seed_of

REMAKE = "delete it and run the same make_shards command again"
SHEET_SAMPLES, THUMB_PX = 24, 192


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
    """Read the index of a local set. Raises ValueError when it is missing or has another format."""
    if ":" in folder.parts[0]:  # a URL: `Path` turned s3:// into s3:/
        raise ValueError(f"{folder}: only a local folder can be verified; copy the set to this machine first")
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder that contains {INDEX}")
    try:
        index = json.loads((folder / INDEX).read_text())
    except OSError:
        raise ValueError(
            f"{folder} holds no {INDEX}: the set is not finished; run its make_shards command again"
        ) from None
    except ValueError as error:
        raise ValueError(f"{folder / INDEX} is broken ({error}): run its make_shards command again") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else None
        raise ValueError(f"{folder / INDEX} has format {found}, this version reads {FORMAT}: make the set again")
    return index


def verify_set(folder: Path, share: float, redo: int, workers: int) -> tuple[list[str], list[str], dict]:
    """Check a whole set; return (problems, warnings, index).

    `share` is the fraction of the samples to decode, `redo` the number of samples to degrade again. Raises ValueError
    when the set has no valid index.
    """
    index = read_index(folder)
    problems, warnings = _check_index(folder, index)
    specs, first = [], 0
    total = max(1, sum(row["nsamples"] for row in index["shards"]))
    again = set(np.linspace(0, total - 1, redo).round().astype(int).tolist()) if redo else set()
    for row in index["shards"]:
        n = row["nsamples"]
        chosen = np.random.default_rng(seed_of("verify", row["shard"])).permutation(n)[: max(1, round(share * n))]
        redone = tuple(i - first for i in sorted(again) if first <= i < first + n)
        picked = tuple(sorted({*chosen.tolist(), *redone}))
        specs.append(ShardCheck(str(folder), row, index["settings"], tuple(index["libraries"]), first, picked, redone))
        first += n
    line = ProgressLine("verify", sum(len(s.decode) for s in specs), "samples")
    found = engines.run(verify_shard, specs, "local", workers, line.add)
    line.close()
    return problems + [problem for rows in found for problem in rows], warnings, index


def _check_index(folder: Path, index: dict) -> tuple[list[str], list[str]]:
    rows = index["shards"]
    problems = []
    if set_hash(rows) != index["set_sha256"]:
        problems.append(
            f"{INDEX}: set_sha256 is not the hash of the listed shards: run the same make_shards command again"
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
    try:
        data = check.path.read_bytes()
    except OSError as error:
        on_done(len(check.decode))
        return [f"{name} cannot be read ({error.strerror}): run the same make_shards command again"]
    problems = []
    if len(data) != row["bytes"]:
        problems.append(f"{name} has {len(data)} bytes, {INDEX} says {row['bytes']}: {REMAKE}")
    elif hashlib.sha256(data).hexdigest() != row["sha256"]:
        problems.append(f"{name} is corrupted (its sha256 differs from {INDEX}): {REMAKE}")
    try:
        manifest = json.loads(check.path.with_suffix(".json").read_text())
    except (OSError, ValueError):
        manifest = None
    if manifest != row:
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

    A key appears twice when its members are not adjacent. Raises TarError when the tar is truncated or a member appears
    twice.
    """
    key, members = "", {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for info in tar:
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


def _check_keys(check: ShardCheck, keys: list[str]) -> list[str]:
    wanted = [sample_key(check.first + i) for i in range(check.row["nsamples"])]
    if keys == wanted:
        return []
    name, twice = check.row["shard"], sorted({key for key in keys if keys.count(key) > 1})
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
        sums = record["crc32"]
    except (KeyError, ValueError, TypeError):
        return [f"{key}.json is missing or broken"]
    for field, px in wanted.items():
        if field not in members:
            problems.append(f"{key}.{field} is missing")
        elif zlib.crc32(members[field]) != sums.get(field):
            problems.append(f"{key}.{field} is corrupted (its crc32 differs from the recorded one)")
        else:
            try:
                pictures[field] = x = images.decode_rgb(members[field], field)
                if x.shape[:2] != (px, px):
                    problems.append(f"{key}.{field} is {x.shape[1]}x{x.shape[0]} px, it must be {px}x{px}")
            except ValueError as error:
                problems.append(f"{key}.{error}")
    problems += [
        f"{key}.{field} does not belong to this sample" for field in sorted(set(members) - set(wanted) - {"json"})
    ]
    if redo and not problems and hq_field != "hq.jpg":
        problems += _redo(check, key, pictures[hq_field], [pictures[f] for f in lq_fields], record)
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


def contact_sheet(folder: Path, index: dict) -> np.ndarray:
    """Up to 24 samples spread over the set, enlarged LQ beside HQ, with key and source: [H, W, 3] uint8."""
    total = sum(row["nsamples"] for row in index["shards"])
    chosen = sorted(set(np.linspace(0, total - 1, min(SHEET_SAMPLES, total)).round().astype(int).tolist()))
    tiles, first = [], 0
    for row in index["shards"]:
        mine = [i - first for i in chosen if first <= i < first + row["nsamples"]]
        if mine:
            samples = list(read_samples((folder / row["shard"]).read_bytes()))
            tiles += [_tile(*samples[i]) for i in mine if i < len(samples)]
        first += row["nsamples"]
    columns = min(4, len(tiles))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    return np.vstack([np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)])


def _tile(key: str, members: dict[str, bytes]) -> np.ndarray:
    tile = Image.new("RGB", (2 * THUMB_PX + 12, THUMB_PX + 40), "white")
    hq = next(data for field, data in members.items() if field.startswith("hq."))
    for i, (data, way) in enumerate(((members["lq.png"], Image.Resampling.NEAREST), (hq, Image.Resampling.LANCZOS))):
        picture = Image.fromarray(images.decode_rgb(data, key))
        tile.paste(picture.resize((THUMB_PX, THUMB_PX), way), (4 + i * (THUMB_PX + 4), 4))
    source = json.loads(members["json"])["source"]
    draw = ImageDraw.Draw(tile)
    draw.text((4, THUMB_PX + 7), key, fill="black")
    draw.text((4, THUMB_PX + 21), source if len(source) < 60 else f"..{source[-58:]}", fill="black")
    return np.asarray(tile)
