"""Prepare a shard set: inspect the photographs, write the missing shards, then write the index.

Any number of processes and machines may run this on the same folder at once, each on a part of its own, and any of
them may be killed safely.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from teasr.data.layout import INDEX, read_manifest
from teasr.data.prep import engines, folder, sources
from teasr.data.prep.making import finish, libraries, process_shard, settings_of
from teasr.data.prep.plan import Plan, PrepConfig, make_plan, reasons
from teasr.util.files import remove_strays
from teasr.util.progress import ProgressLine


def make_set(
    config: PrepConfig, engine: str = "local", workers: int = 1, rank: int = 0, world: int = 1, overwrite: bool = False
) -> None:
    """Make the shard set of `config`, or part `rank` of `world` of it, and print a summary with the skipped images.

    Raises OSError when the disk or a worker fails, and ValueError when the photographs cannot be used, when another
    process makes this part, or when the folder holds another set or other files and `overwrite` is not given. Finished
    shards are kept.
    """
    folders = {
        name: str(Path(path).expanduser()) for name in ("photos", "out", "lq") if (path := getattr(config, name))
    }
    config = replace(config, **folders)
    out, lq = Path(config.out), Path(config.lq) if config.lq else None
    found = sources.find(Path(config.photos), out, lq, config.scale, config.keeps_jpeg)
    with folder.claimed(out, settings_of(config), "making shards", rank, world, overwrite):
        plan = _inspect(config, found, engine, workers, rank, world)
        if not overwrite:
            _check_photographs(plan)
        _make(plan, engine, workers, rank, world)


def _make(plan: Plan, engine: str, workers: int, rank: int, world: int) -> None:
    """Write the missing shards of this part, and the index if no shard is missing then."""
    out = Path(plan.config.out)
    remove_strays(out)
    done = {spec.shard: m for spec in plan.shards if (m := read_manifest(spec.path, spec.identity))}
    missing = [spec for spec in engines.my_part(plan.shards, rank, world) if spec.shard not in done]
    _warn_of_other_libraries(done)
    kept = sum(m["nsamples"] for m in done.values())
    if len(done) < len(plan.shards):
        (out / INDEX).unlink(missing_ok=True)  # so that no reader mixes old and new shards
    if missing:
        total = kept + sum(len(spec.crops) for spec in missing)
        with ProgressLine("prepare", total, "samples", kept) as line:
            manifests = engines.run(process_shard, missing, engine, workers, line.add)
        done |= {spec.shard: manifest for spec, manifest in zip(missing, manifests, strict=True)}
    done |= {s.shard: m for s in plan.shards if s.shard not in done and (m := read_manifest(s.path, s.identity))}
    if len(done) < len(plan.shards):
        print(f"part {rank} of {world} is done; {len(plan.shards) - len(done)} shards of other parts are still missing")
        return
    index = finish(plan, [done[spec.shard] for spec in plan.shards])
    _summarise(plan, index)


def _check_photographs(plan: Plan) -> None:
    """Raise ValueError if a finished set in the folder was made of other photographs or captions."""
    index = folder.finished_set(Path(plan.config.out))
    if not index or [row.get("identity") for row in index["shards"]] == [spec.identity for spec in plan.shards]:
        return
    old = Counter(source["sha256"] for source in index.get("sources", []))
    new = Counter(photo.sha256 for photo in plan.photos)
    if old == new and plan.config.captions == "files":
        raise ValueError(f"{plan.config.out} holds a set with other captions of these photographs: {folder.CURE}")
    raise ValueError(
        f"{plan.config.out} holds a set of other photographs ({(new - old).total()} are new, "
        f"{(old - new).total()} are gone): {folder.CURE}"
    )


def _inspect(
    config: PrepConfig,
    found: tuple[list[sources.Chunk], list[tuple[str, str]]],
    engine: str,
    workers: int,
    rank: int,
    world: int,
) -> Plan:
    """Inspect every photograph that was found and make the plan.

    The parts of a job start at different chunks and share the results.
    """
    chunks, problems = found
    start = rank * len(chunks) // world
    order = chunks[start:] + chunks[:start]
    with ProgressLine("inspect", sum(chunk.photos for chunk in chunks), "photos") as line:
        inspected = engines.run(sources.inspect_chunk, order, engine, workers, line.add)
    return make_plan(config, [row for rows in inspected for row in rows] + problems)


def _warn_of_other_libraries(done: dict[int, dict]) -> None:
    """Warn when a finished shard was made with other library versions.

    Such shards are kept, although their bytes may differ from those that would be written now.
    """
    other = next((m for m in done.values() if m["libraries"] != libraries()), None)
    if other:
        changed = [
            f"{k} {other['libraries'].get(k)} -> {v}" for k, v in libraries().items() if other["libraries"].get(k) != v
        ]
        print(
            f"warning: {other['shard']} was made with other library versions ({', '.join(changed)}); "
            "to make all shards with the same versions, delete it and run the same command again"
        )


def _summarise(plan: Plan, index: dict) -> None:
    """Print samples, shards, bytes, hash, and the number of skipped images by reason."""
    size = sum(m["bytes"] for m in index["shards"])
    variants = f" x {plan.config.variants} variants" if plan.config.variants > 1 else ""
    print(
        f"{plan.config.out}: {plan.samples} samples{variants} of {plan.config.crop_px} px "
        f"from {len(plan.photos)} photos in "
        f"{len(plan.shards)} shards, {size / 1e6:.1f} MB, sha256 {index['set_sha256'][:12]}"
    )
    for reason, n in reasons(plan).items():
        print(f"skipped {n}: {reason} (listed in {plan.config.out}/index.json)")
