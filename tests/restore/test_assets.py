"""assets/: the shipped models are complete, small, free of private paths, and as good as their card says."""

import fnmatch
import re
import subprocess
import sys

import numpy as np
import pytest
import skimage.data
import warm
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file

from teasr import Upscaler, assets, cli
from teasr.degradation import degrade, preset
from teasr.diffusion.losses import checkerboard_energy
from teasr.imaging.exact_metrics import energy_ratio, psnr, seam_ratio
from teasr.imaging.images import to_tensor, upsample
from teasr.restore import pretrained
from teasr.util import checkpoint_folder
from teasr.util.seed import seed_of

CROPS = (
    ("astronaut", 0, 128),
    ("astronaut", 128, 256),
    ("coffee", 60, 200),
    ("chelsea", 40, 120),
    ("rocket", 100, 200),
)


def degraded(name: str, y: int, x: int, seed: int, kind: str = "osediff") -> tuple[np.ndarray, np.ndarray]:
    """A crop of 192 px of a photograph from scikit-image, and its degraded version."""
    hq = np.ascontiguousarray(getattr(skimage.data, name)()[y : y + 192, x : x + 192])
    return hq, degrade(hq, preset(kind), np.random.default_rng(seed_of(seed, "assets", name)))[0]


@pytest.mark.parametrize("name", ["small", "small-prior"])
def test_they_are_whole_small_and_tell_nothing_of_the_machine(name):
    folder = assets.find(name)
    assert checkpoint_folder.problem(folder) is None
    assert sum(file.stat().st_size for file in folder.iterdir()) < 12e6
    weights = load_file(folder / "ema.safetensors")
    assert sum(x.numel() for x in weights.values()) < 10e6
    assert not re.search(r"[ '\"](/|~)", (folder / "config.yaml").read_text())


def test_a_folder_of_the_users_wins_over_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert assets.find("small") == assets.HERE / "small" and assets.find("large") is None
    (tmp_path / "small").mkdir()
    assert assets.find("small") is None
    assert Upscaler.from_pretrained().config.run_dir == "runs/unet"  # the shipped model: no folder was named


def test_the_first_picture_does_not_wait_for_what_it_does_not_need():
    """peft (transformers, bitsandbytes) and PyTorch's compiler take three times as long to import as the rest."""
    code = (
        "import sys, numpy as np; from teasr import Upscaler; "
        "Upscaler.from_pretrained()(np.zeros((32, 32, 3), np.uint8)); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not {"peft", "transformers", "diffusers", "torch._dynamo", "mlflow", "deepspeed"} & set(done.stdout.split())


def test_the_package_takes_every_file_along():
    patterns = re.search(r'package_data=\{"teasr": \[(.*?)\]\}', (ROOT / "setup.py").read_text()).group(1)
    globs = re.findall(r'"(.*?)"', patterns)
    files = [
        p.relative_to(ROOT / "teasr") for p in assets.HERE.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")
    ]
    assert len(files) >= 9
    assert all(any(fnmatch.fnmatch(str(file), glob) for glob in globs) for file in files)


@pytest.mark.parametrize("kind", ["camera", "osediff"])
def test_it_is_sharper_than_bicubic_as_near_to_the_originals_and_without_grids(kind):
    """On five unseen photographs with three degradations each: what its model card says, without metric weights."""
    upscaler, rows = Upscaler.from_pretrained("small"), []
    for name, y, x in CROPS:
        for seed in range(3):
            hq, lq = degraded(name, y, x, seed, kind)
            results = upsample(lq, 4), upscaler(lq), upscaler(lq, steps=4)
            rows.append([(psnr(z, hq), energy_ratio(z, hq), seam_ratio(z), grid(z)) for z in results])
    bicubic, one, four = np.mean(rows, axis=0)
    assert one[0] > bicubic[0] - 0.3 and four[0] > bicubic[0] - 0.6, "PSNR-Y, dB: at most 0.8 below bicubic"
    assert one[1] > 2 * bicubic[1] and four[1] > one[1], "fine detail, which several steps add"
    assert max(one[2], four[2]) < min(1.1, bicubic[2]), "no seams"
    assert max(one[3], four[3]) < 0.02, "no dots: the model before it had .07"


def grid(x: np.ndarray) -> float:
    """Share of the fine detail that repeats every 4 px."""
    return checkerboard_energy(to_tensor(x)[None], 4).item()


def test_no_model_named_is_the_small_one_and_says_so(tmp_path, caplog, capsys):
    _, lq = degraded("coffee", 60, 200, 0)
    Image.fromarray(lq).save(tmp_path / "a.png")
    assert cli.main(["upscale", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png")]) == 0
    assert "using the small model shipped with teasr" in caplog.text and "qwen_teasr" in caplog.text
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), Upscaler.from_pretrained("small")(lq))
    with pytest.raises(ValueError, match="the models shipped with teasr are small, small-prior"):
        pretrained.load("large")
    with pytest.raises(ValueError, match="unconditional prior"):
        Upscaler.from_pretrained("small-prior")


def test_weights_are_stored_in_half_precision_and_compute_in_full():
    backbone = pretrained.load("small", device="cpu")[0].backbone
    stored = load_file(assets.find("small") / "ema.safetensors")
    own = dict(backbone.net.named_parameters())
    assert {str(x.dtype) for x in stored.values()} == {"torch.float16"}
    assert all(own[name].dtype.is_floating_point and own[name].element_size() == 4 for name in stored)


@pytest.mark.parametrize("model", ["small", str(assets.HERE / "small")])
def test_scores_of_a_shipped_model_do_not_land_beside_it(shards, tmp_path, model):
    command = [
        sys.executable,
        str(ROOT / "eval/benchmark.py"),
        model,
        "--data",
        str(shards),
        "--steps",
        "1",
        "--metrics",
        "psnr",
    ]
    done = warm.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "runs/small/eval" / shards.name / "scores.json").is_file()
    assert {p.name for p in assets.HERE.rglob("*") if p.suffix in (".json", ".db")} == {"MANIFEST.json"}
