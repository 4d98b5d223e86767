"""Who may write a set into a folder: one job for each part, of one set of settings, and nothing is replaced unasked."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from teasr.config import strict_yaml as cfg
from teasr.data.layout import INDEX, parse_index
from teasr.util.files import read_json, write_atomic
from teasr.util.lock import FolderLock, holders, locked

MARKER = ".settings.json"  # of the set that was begun in the folder
CURE = "choose another out=, delete the folder, or add --overwrite to replace what is there"


@contextlib.contextmanager
def claimed(out: Path, settings: dict, task: str, rank: int, world: int, overwrite: bool) -> Iterator[None]:
    """Hold part `rank` of `world` of a set that is made in `out` with these settings; creates the folder.

    `task` says what is done, such as "making shards". Raises ValueError if another process makes this part, or any part
    of a set of other settings; and, unless `overwrite`, if the folder holds such a set or files of another kind.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    mine = f"settings {digest}"
    with locked(FolderLock(out, f"{task}, part {rank} of {world}, {mine}", f".lock-part-{rank}"), print):
        for other in holders(out, ".lock-part-*"):
            if not other.purpose.endswith(mine):
                raise ValueError(
                    f"{out} is in use with other settings by pid {other.pid} on host {other.host} since {other.since} "
                    f"({other.purpose}); wait for it or choose another folder"
                )
        if not overwrite:
            _check(out, settings)
        write_atomic(out / MARKER, json.dumps(settings, indent=1).encode())
        yield


def finished_set(out: Path) -> dict:
    """The index of the finished set in a folder; empty if there is none."""
    try:
        return parse_index((out / INDEX).read_bytes())
    except (OSError, ValueError):
        return {}


def _check(out: Path, settings: dict) -> None:
    """Raise ValueError if a set of these settings would replace something else in the folder."""
    index = finished_set(out)
    old = index.get("settings") if index else read_json(out / MARKER)
    foreign = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    if not old and foreign:
        raise ValueError(f"{out} is not empty ({', '.join(foreign[:3])}), and no set was begun in it: {CURE}")
    if not old or not (index or any(out.glob("shard-*.json"))):
        return  # nothing is finished yet that could be lost
    known = old.keys() & settings.keys()  # those of both versions of this program
    changed = cfg.diff(*({key: _comparable(key, each[key]) for key in known} for each in (old, settings)))
    if changed:
        kind = "a set" if index else "an unfinished set"
        raise ValueError(f"{out} holds {kind} of other settings ({'; '.join(changed)}): {CURE}")


def _comparable(key: str, value: Any) -> Any:
    """The value of a setting as far as it matters: the folder of the real LQ images may move."""
    return bool(value) if key == "lq" else value
