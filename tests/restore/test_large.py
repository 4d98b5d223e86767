"""large.py, scratch.py, bands.py: a picture in temporary files is restored to the same bits, in little memory."""

import errno
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import skimage.data
import torch
from conftest import ROOT

from teasr import Upscaler
from teasr.diffusion import flow
from teasr.imaging import bands, images
from teasr.restore import large
from teasr.util import scratch as scratch_module
from teasr.util.scratch import Scratch

LQ = np.ascontiguousarray(skimage.data.coffee()[100:161, 200:283])  # 244 x 332 px: not a multiple of 8


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Everything but the smallest arrays lies in files, and is computed in narrow bands."""
    monkeypatch.setattr(scratch_module, "LARGE", 1000)
    monkeypatch.setattr(bands, "BAND", 3000)
    monkeypatch.setattr(large, "DRAWN", 64)
    return Scratch(tmp_path)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {"steps": 1},
        {"steps": 3, "fidelity": 0.3},
        {"steps": 2, "color_fix": "wavelet", "scale": 3.3},
        {"steps": "auto", "color_fix": "lab"},
        {"steps": 1, "color_fix": "adain", "size": (400, 301)},
    ],
)
def test_files_instead_of_memory_change_no_bit(untrained, how, deep, tmp_path, monkeypatch):
    upscaler, lq = Upscaler.from_pretrained(untrained), LQ.astype(np.uint16) * 257 if deep else LQ
    how = how | {"tile_px": 104, "say": lambda text: None}
    wanted = upscaler(lq, **how)
    monkeypatch.setattr(scratch_module, "LARGE", 1000)
    monkeypatch.setattr(bands, "BAND", 3000)
    monkeypatch.setattr(large, "DRAWN", 64)
    assert np.array_equal(upscaler(lq, scratch=Scratch(tmp_path), **how), wanted)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [(244, 332), (152, 208), (97, 83), (61, 84)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_bands_are_resized_to_the_bits_of_the_whole(scratch, size, dtype):
    x = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (61, 83, 3)).astype(dtype)
    out = scratch.zeros((*size, 3), dtype)
    bands.resize_into(out, x, scratch)
    assert np.array_equal(out, images.resize(x, *size))
    alpha = bands.resize_alpha(x[..., 0], *size, scratch).astype(int)
    assert np.abs(alpha - bands.resize_alpha(x[..., 0], *size)).max() <= 2


@pytest.mark.parametrize("shape", [(1, 48, 20, 28), (1, 5, 7, 33), (1, 3, 31, 41)])
def test_latents_in_files_compute_as_tensors_do(scratch, shape):
    z, v = (large.noise(shape, torch.Generator().manual_seed(seed), scratch) for seed in (1, 2))
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert type(z) is large.Large and torch.equal(large.plain(z), a) and torch.equal(large.plain(v), b)
    t = torch.tensor([0.3])
    for function in (
        lambda z, v: flow.step(z, v, t, t / 2),
        lambda z, v: torch.lerp(z, v, 0.7),
        lambda z, v: flow.interpolate(z, v, t).clamp(-1, 1),
    ):
        made = function(z, v)
        assert type(made) is large.Large and torch.equal(large.plain(made), function(a, b))
    assert torch.equal(z[..., 2:5, 1:4] * 2, a[..., 2:5, 1:4] * 2) and z.mean() == a.mean()


def test_callbacks_see_plain_latents_and_may_replace_them(untrained, scratch):
    upscaler, seen = Upscaler.from_pretrained(untrained), []

    def look(i, of, z):
        seen.append(z.numpy().shape)
        return z * 0 if i == 1 else None

    with_files = upscaler(LQ, 2, on_step=look, scratch=scratch)
    assert seen == [(1, 48, 31, 42)] * 2 and np.array_equal(with_files, upscaler(LQ, 2, on_step=look))


def test_a_full_disk_is_an_error_before_the_work(untrained, scratch, monkeypatch):
    usage = shutil.disk_usage(scratch.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10**5))
    with pytest.raises(OSError, match=r"do not fit on the disk, which has 0.0 GB free") as caught:
        Upscaler.from_pretrained(untrained)(LQ, scratch=scratch)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(scratch.folder)


KILLED = """
import os, signal, sys
from pathlib import Path
from teasr.util.scratch import LARGE, Scratch
x = Scratch(Path(sys.argv[1])).zeros((LARGE,), "u1")
x[:] = 1
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_9_leaves_no_temporary_file(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL and not os.listdir(tmp_path)


MEASURED = """
import resource, sys
from pathlib import Path
import numpy as np
import torch
from teasr.imaging import bands, picture
from teasr.util import scratch as module

module.LARGE, bands.BAND, scratch = 2**20, 2**20, module.Scratch(Path(sys.argv[1]))
lq = np.random.default_rng(0).integers(0, 256, (700, 1500, 3)).astype(np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
frame = scratch.zeros((2800, 6000, 3), np.uint8)
bands.resize_into(frame, lq, scratch)
copies = [bands.copy(frame, scratch) for _ in range(3)]
picture.write(Path(sys.argv[1]) / "x.jpg", picture.Picture(copies[-1]), lambda done, of: scratch.release())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_that_of_bands_not_of_the_picture(tmp_path):
    """Four arrays of 50 MB each are filled, and one is written."""
    done = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100_000, done.stdout
