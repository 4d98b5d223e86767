"""Attack teasr with damaged, hostile and contradictory input, and print what it does about it.

    python bench/attacks.py                  # all cases
    python bench/attacks.py shard lock       # the cases whose name contains one of the words

A case is a function that gets an empty folder, attacks, and returns the outcome in a few words. It raises
AssertionError if the attack succeeds. Exit code 1 when any did.
"""

from __future__ import annotations

import argparse
import os
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 240  # a program that takes longer hangs


def main() -> int:
    """Run the cases and print a table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="run the cases whose name contains one of the words")
    words = parser.parse_args().words
    from attacks_restoring import RESTORING
    from attacks_training import TRAINING

    cases = [*CASES, *TRAINING, *RESTORING]
    chosen = [(name, case) for name, case in cases if not words or any(word in name for word in words)]
    bad = [name for name, case in chosen if not _survives(name, case)]
    print(f"{len(chosen) - len(bad)} of {len(chosen)} attacks failed, as they should")
    return 1 if bad else 0


def _survives(name: str, case: Callable[[Path], str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            good, outcome = True, case(Path(folder))
        except (AssertionError, subprocess.TimeoutExpired) as error:
            good, outcome = False, f"BAD: {error}"
        outcome = " ".join(outcome.replace(f"{folder}/", "").split())
    print(f"{name:52s} -> {outcome[:150]}", flush=True)
    return good


def run(*command: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run a program of this repository, such as run("launch/train.py", "--config", path), and capture its output.

    "teasr" as the program is the command-line tool.
    """
    program = ["-m", "teasr.cli"] if command[0] == "teasr" else [str(ROOT / str(command[0]))]
    return subprocess.run(
        [sys.executable, *program, *map(str, command[1:])], cwd=cwd, capture_output=True, text=True,
        timeout=PATIENCE_S, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess, *words: str) -> str:
    """Check that a program ended with exit code 2 and a line `error: ..` that contains the words; return this line."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, f"exit code {done.returncode}: {lines[-1:] or done.stdout[-200:]}"
    assert "Traceback" not in done.stderr and lines[-1].startswith("error: "), f"not one line of error: {lines[-1]}"
    assert all(word in lines[-1] for word in words), f"{words} are not in {lines[-1]}"
    return lines[-1]


def finished(done: subprocess.CompletedProcess, code: int = 0) -> str:
    """Check that a program ended with this exit code and without a traceback; return the end of its output."""
    assert done.returncode == code, f"exit code {done.returncode}: {(done.stderr or done.stdout)[-300:]}"
    assert "Traceback" not in done.stderr, done.stderr[-300:]
    return done.stdout.strip().splitlines()[-1]


# data


def photos(folder: Path, count: int = 3) -> Path:
    """A folder of noise pictures, which are sharp enough to be used."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (96, 128, 3)).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"photo{i}.png")
    return folder


def make_shards(source: Path, out: Path, *more: str, **environment: str) -> subprocess.CompletedProcess:
    """Run make_shards.py with small crops."""
    settings = ("crop_px=64", "crops_per_photo=4", "shard_samples=4")
    return run("data_prep/make_shards.py", f"photos={source}", f"out={out}", *settings, *more, **environment)


def a_set(folder: Path) -> Path:
    """A finished shard set of 12 samples in 3 shards."""
    finished(make_shards(photos(folder / "photos"), folder / "set"))
    return folder / "set"


def content(folder: Path) -> dict[str, str]:
    """The hash of every visible file in a folder, by name."""
    from teasr.util.files import sha256_of

    return {path.name: sha256_of(path) for path in folder.iterdir() if not path.name.startswith(".")}


def shell_command_in_a_shard_name(folder: Path) -> str:
    """An index.json from the internet names a shard after which a shell would run a command."""
    from teasr.data.shards import ShardSet, read_shard

    a_set(folder)
    path = folder / "set/index.json"
    path.write_text(path.read_text().replace("shard-000000.tar", f"shard-000000.tar; touch {folder}/PWNED", 1))
    try:
        read_shard(ShardSet.open(f"pipe:cat {folder}/set/{{name}}").urls[0])
        told = "no error"
    except ValueError as error:
        told = str(error)
    assert not (folder / "PWNED").exists(), "the command was run"
    assert "is not a plain file name" in told, told
    return told


def other_settings_into_a_finished_set(folder: Path) -> str:
    """The command for one set is run with the folder of another."""
    before = content(a_set(folder))
    told = refused(make_shards(folder / "photos", folder / "set", "seed=1"), "seed: 0 -> 1", "--overwrite")
    assert content(folder / "set") == before, "the set has changed"
    finished(make_shards(folder / "photos", folder / "set", "seed=1", "--overwrite"))
    return told


def other_photographs_into_a_finished_set(folder: Path) -> str:
    """Photographs were added since the set was made."""
    before = content(a_set(folder))
    told = refused(make_shards(photos(folder / "photos", 4), folder / "set"), "1 are new")
    assert content(folder / "set") == before, "the set has changed"
    return told


def shards_into_a_folder_of_other_files(folder: Path) -> str:
    """out= is a folder with a README.md of its own."""
    (folder / "README.md").write_text("mine")
    photos(folder / "photos")
    told = refused(make_shards(folder / "photos", folder), "is not empty")
    assert (folder / "README.md").read_text() == "mine", "README.md was overwritten"
    return told


def two_jobs_on_one_part(folder: Path) -> str:
    """The same command is started twice; a second part of the same set may run."""
    from teasr.util.lock import FolderLock

    photos(folder / "photos")
    with FolderLock(folder / "set", "making shards", ".lock-part-0"):
        return refused(make_shards(folder / "photos", folder / "set"), f"in use by pid {os.getpid()}")


def killed_and_started_again(folder: Path) -> str:
    """kill -9 in the middle, also of the lock's holder; the same command must end with the same bytes."""
    before = content(a_set(folder))
    command = ["data_prep/make_shards.py", f"photos={folder}/photos", f"out={folder}/again", "--workers", "1"]
    job = subprocess.Popen(
        [sys.executable, *command, "crop_px=64", "crops_per_photo=4", "shard_samples=4"], cwd=ROOT,
        stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    while not list(folder.glob("again/shard-*.tar")) and job.poll() is None:
        time.sleep(0.001)
    job.kill()
    job.wait()
    told = finished(make_shards(folder / "photos", folder / "again"))
    assert content(folder / "again") == before, "the bytes differ"
    return told


def links_and_devices_in_a_shard(folder: Path) -> str:
    """Members of a tar are a link to /etc/passwd, a device, a folder."""
    with tarfile.open(a_set(folder) / "shard-000001.tar", "a") as tar:
        for name, kind in (("link", tarfile.SYMTYPE), ("disk", tarfile.BLKTYPE), ("folder", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(f"000000007.{name}")
            info.type, info.linkname = kind, "/etc/passwd" if name == "link" else ""
            tar.addfile(info)
    done = run("data_prep/verify_shards.py", folder / "set")
    told = finished(done, code=1)
    for problem in ("link is a symbolic link", "disk is a device", "folder is a folder"):
        assert f"shard-000001.tar/000000007.{problem}, not a plain file" in done.stdout, f"not named: {problem}"
    return told


def bomb_in_a_shard(folder: Path) -> str:
    """A picture of 100 kilobytes that unpacks to 5 gigabytes, with right hashes."""
    from teasr.imaging import images

    head = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(10**7))), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )
    try:
        images.decode_rgb(data, "000000007.hq.png")
    except ValueError as error:
        return str(error)
    raise AssertionError("it was unpacked")


def traps_among_the_photographs(folder: Path) -> str:
    """A named pipe, links in circles, a dangling link and a file of a terabyte, all called .png."""
    traps(photos(folder / "photos"))
    done = make_shards(folder / "photos", folder / "set")
    told = finished(done)
    assert "skipped 1: special file" in done.stdout and "from 3 photos" in done.stdout, done.stdout
    return told


def traps_in_a_folder_to_upscale(folder: Path) -> str:
    """The same, for `teasr upscale`, and a name of 244 characters."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    (folder / "in").mkdir()
    for name in ("a.png", "x" * 240 + ".png"):
        Image.fromarray(noise).save(folder / "in" / name)
    traps(folder / "in")
    done = run("teasr", "upscale", folder / "in", "-o", folder / "out")
    finished(done, code=1)
    assert len(list((folder / "out").iterdir())) == 2, "pictures are missing"
    return done.stderr.strip().splitlines()[-1]


def traps(folder: Path) -> None:
    """Put files that wait forever, lead nowhere or are too large into a folder."""
    os.mkfifo(folder / "pipe.png")
    for name, target in (("circle.png", "circle.png"), ("nowhere.png", "missing.png"), ("up", "..")):
        (folder / name).symlink_to(target)
    with open(folder / "huge.png", "wb") as file:
        file.truncate(2**40)


CASES: list[tuple[str, Callable[[Path], str]]] = [
    # data
    ("shard name with a shell command, pipe:", shell_command_in_a_shard_name),
    ("make_shards with other settings into a set", other_settings_into_a_finished_set),
    ("make_shards with other photographs into a set", other_photographs_into_a_finished_set),
    ("make_shards into a folder of other files", shards_into_a_folder_of_other_files),
    ("make_shards twice at once on one part", two_jobs_on_one_part),
    ("make_shards killed and started again", killed_and_started_again),
    ("links and devices in a shard, verify_shards", links_and_devices_in_a_shard),
    ("picture bomb in a shard", bomb_in_a_shard),
    ("pipes, circles of links, make_shards", traps_among_the_photographs),
    ("pipes, circles of links, long name, upscale", traps_in_a_folder_to_upscale),
]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
