"""The README's own lines, run as they stand there with less work: restoring, and both ways to a model of one's own."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import skimage.data
import warm
from conftest import ROOT
from PIL import Image

from teasr.util.distributed import free_port

LESS = {  # beginning of a line -> what is appended to it
    "teasr train --photos": "--crops 8 train.updates=2 train.batch=4 train.micro_batch=4 method.lambda_lpips=0",
    "python data_prep/make_shards.py photos=~/pictures": "crops_per_photo=4 shard_samples=4",
    "python data_prep/make_shards.py photos=~/other_pictures": "crop_px=128",
    "deepspeed": "train.updates=2 train.batch=4 train.micro_batch=4 method.lambda_lpips=0 data.streams=1",
    "python eval/benchmark.py": "--metrics psnr",
    "teasr upscale": "",
}
PROGRAMS = {
    "teasr": [sys.executable, "-m", "teasr.cli"],
    "python": [sys.executable],
    "deepspeed": ["deepspeed", "--master_port", str(free_port())],
}


def lines(heading: str) -> list[str]:
    """Return the shell lines of a section, without those that start a server or need the network."""
    section = (ROOT / "README.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    code = "\n".join(re.findall(r"^    (.*)$", re.sub(r"\\\n *", "", section), re.M))
    return [line for line in code.splitlines() if not line.startswith(("teasr demo", "teasr weights"))]


def run(line: str, place: Path) -> str:
    """Run a line of the README in this folder, whose `home` is the home, and return what it printed."""
    (less,) = (words for begin, words in LESS.items() if line.startswith(begin))
    name, *words = shlex.split(f"{line.partition('  #')[0]} {less}")
    words = [str(place / "home" / word[2:]) if word.startswith("~/") else word for word in words]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    env |= {"HOME": str(place / "home")}
    done = warm.run([*PROGRAMS[name], *words], cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture
def place(tmp_path) -> Path:
    """A checkout, with photographs in the home and some to restore."""
    for name in ("data_prep", "launch", "eval", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    source = Path(skimage.data.__file__).parent
    for folder, names in {"pictures": ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png"),
                          "other_pictures": ("brick.png", "color.png")}.items():  # fmt: skip
        (tmp_path / "home" / folder).mkdir(parents=True)
        for name in names:
            if (source / name).exists():
                shutil.copyfile(source / name, tmp_path / "home" / folder / name)
    (tmp_path / "holiday").mkdir()
    with Image.open(source / "chelsea.png") as cat:
        for name in ("photo.jpg", "photo.png", "holiday/cat.jpg"):
            cat.crop((100, 50, 148, 90)).save(tmp_path / name)
    return tmp_path


def test_one_command_makes_a_model_that_restores(place, monkeypatch):
    train, upscale = [line for line in lines("Train on your own photographs") if line.startswith("teasr")]
    own = run(train, place)
    assert run(upscale, place) and Image.open(place / "photo_x4.png").size == (192, 160)
    assert upscale in own  # it ends with the command that uses the model
    (place / "photo_x4.png").unlink()
    for line in lines("Restore pictures"):
        run(line, place)
    assert Image.open(place / "photo_x4.png").size == Image.open(place / "restored/cat.jpg").size == (192, 160)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    monkeypatch.chdir(place)
    exec(code, {})
    assert Image.open("restored.png").size == (192, 160)


def test_the_long_way_ends_with_scores(place):
    printed = [run(line, place) for line in lines("Train on your own photographs") if not line.startswith("teasr")]
    assert len(printed) == 4 and "the model is in runs/own; next:" in printed[2]
    scores = json.loads((place / "runs/own/eval/heldout/scores.json").read_text())["methods"]
    assert list(scores) == ["bicubic", "1 step", "2 steps", "4 steps", "8 steps"]
