"""Make the sidecars of a shard set (data/sidecars.py), one shard after another; a finished sidecar is kept."""

from __future__ import annotations

import hashlib
import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from teasr.data.layout import FORMAT, INDEX, commit, commit_shard, read_manifest, set_hash
from teasr.data.prep.engines import my_part
from teasr.data.prep.folder import claimed
from teasr.data.prep.making import add_member
from teasr.data.shards import ShardSet, read_shard
from teasr.util.files import Hashed, atomic_file, remove_strays, sha256_of
from teasr.util.progress import ProgressLine


class SidecarJob(ABC):
    """A set of sidecars that is being written: its source shards, settings and output folder."""

    what: str  # what the sidecars hold, such as "latents": their folder inside that of the shards, and in messages
    member: str  # name of a member of a sidecar, without its key
    mark: str  # a key of the settings that only such sidecars have
    libraries: tuple[str, ...]  # whose versions the manifests record

    def __init__(self, shards: str, out: str | None, settings: dict):
        """settings: with the hash of the shard, all that determines the bytes of a sidecar except library versions."""
        self.source = Path(shards).expanduser()
        self.shards = ShardSet.open(str(self.source))
        index = json.loads((self.source / INDEX).read_text())
        self.rows, self.origin = index["shards"], {"shards_sha256": set_hash(index["shards"])}
        self.out = Path(out).expanduser() if out else self.source / self.what
        self.settings = settings
        if (self.out / INDEX).exists() and f'"{self.mark}"' not in (self.out / INDEX).read_text():
            raise ValueError(f"out = {self.out} holds the {INDEX} of a set without {self.what}: choose another folder")

    @abstractmethod
    def members(self, raw: list[dict], source: Path) -> Iterator[tuple[int, str, bytes]]:
        """Yield (number of the sample, key, content) of each member of a sidecar.

        Raises ValueError naming a broken sample.
        """

    @abstractmethod
    def manifest(self) -> dict:
        """Return what the manifest of the sidecar that was just written records besides."""

    @abstractmethod
    def index(self, manifests: list[dict]) -> dict:
        """Return further keys of the index; its `settings` are added to those of the job."""

    @abstractmethod
    def summary(self, index: dict) -> str:
        """Return what to print about the finished set, and how to use it."""

    def identity(self, row: dict) -> str:
        """Hash of everything that determines the bytes of a shard's sidecar, except library versions."""
        text = json.dumps([FORMAT, self.member, row["sha256"], self.settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def finished(self, row: dict) -> dict | None:
        """Return the manifest of a shard's sidecar if the sidecar is finished and up to date, else None."""
        return read_manifest(self.out / row["shard"], self.identity(row))

    def write(self, row: dict, line: ProgressLine, before: int) -> dict:
        """Write one sidecar and its manifest, and return the manifest.

        `before` is the number of samples done so far. Raises ValueError naming what is broken.
        """
        path, source, keys = self.out / row["shard"], self.source / row["shard"], []
        try:
            raw = read_shard(str(source))
        except ValueError as error:
            raise self.broken(source, error) from None
        with atomic_file(path) as file:
            hashed = Hashed(file)
            with tarfile.open(fileobj=hashed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for sample, key, content in self.members(raw, source):
                    add_member(tar, f"{key}.{self.member}", content)
                    keys.append(key)
                    line.show(before + sample + 1)
            if sha256_of(source) != row["sha256"]:
                raise self.broken(source, f"{source} is not the shard that {INDEX} lists (its sha256 differs)")
        more = {"source_sha256": row["sha256"], "libraries": {name: version(name) for name in self.libraries}}
        return commit_shard(path, keys, hashed, self.identity(row), **more, **self.manifest())

    def finish(self, manifests: list[dict]) -> dict:
        """Write index.json, which marks the set as complete, delete leftovers of an earlier set; return the index."""
        more = self.index(manifests)
        index = {
            "format": FORMAT,
            "settings": more.pop("settings", {}) | self.settings | self.origin,
            **more,
            "set_sha256": set_hash(manifests),
            "shards": manifests,
        }
        commit(self.out, index)
        return index

    def broken(self, source: Path, error: object) -> ValueError:
        """Return an error about a broken source shard, with the cure."""
        return ValueError(
            f"{error}; finished shards of {self.what} are kept: check the shard set with `teasr verify`, delete "
            f"{source} and its .json, make it again with the command that made the set, then run this command again"
        )


def make_sidecars(job: SidecarJob, rank: int = 0, world: int = 1, overwrite: bool = False) -> None:
    """Write the sidecars that are not finished yet, or those in part `rank` of `world`.

    The process that finds all sidecars finished writes the index. Raises ValueError naming what cannot be used, also
    when another process makes this part, or when the folder holds other sidecars or other files and `overwrite` is not
    given; and OSError when the disk fails. Finished sidecars are kept.
    """
    with claimed(job.out, job.settings | job.origin, f"caching {job.what}", rank, world, overwrite):
        _make(job, rank, world)


def _make(job: SidecarJob, rank: int, world: int) -> None:
    """Write the missing sidecars of this part, and the index if none is missing then."""
    remove_strays(job.out)
    done = {row["shard"]: m for row in job.rows if (m := job.finished(row))}
    missing = [row for row in my_part(job.rows, rank, world) if row["shard"] not in done]
    if missing:
        (job.out / INDEX).unlink(missing_ok=True)  # it belongs to an earlier set: no reader may mix the two
    count = sum(row["nsamples"] for row in job.rows if row["shard"] in done)
    with ProgressLine(job.what, count + sum(row["nsamples"] for row in missing), "samples", count) as line:
        for row in missing:
            done[row["shard"]] = job.write(row, line, count)
            count += row["nsamples"]
            line.show(count)
    done |= {row["shard"]: m for row in job.rows if row["shard"] not in done and (m := job.finished(row))}
    if len(done) < len(job.rows):
        print(
            f"part {rank} of {world} is finished; {len(job.rows) - len(done)} shards of other parts are still missing"
        )
        return
    print(job.summary(job.finish([done[row["shard"]] for row in job.rows])))
