"""`teasr train --photos`: shards, training, scores and a model from a folder of photographs, in one command."""

import json
import re
import sys

import pytest
import warm
from safetensors.torch import load_file

from teasr import Upscaler, assets
from teasr.commands import train
from teasr.data.shards import ShardSet
from teasr.util import checkpoint_folder


def run(*arguments, cwd):
    command = [sys.executable, "-m", "teasr.cli", "train", *map(str, arguments)]
    return warm.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def made(photos, tmp_path_factory):
    """The folder of a model, and what the command and its repetition printed. The learning rate changes nothing."""
    folder = tmp_path_factory.mktemp("mine")
    settings = ("train.updates=2", "train.batch=4", "train.micro_batch=4", "train.learning_rate=1e-12")
    settings += ("method.lambda_lpips=0",)  # its weights would have to be fetched
    printed = []
    for _ in range(2):
        done = run("--photos", photos, "--out", "model", "--crops", 40, "--name", "cats", *settings, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        printed.append(done.stdout)
    return folder / "model", printed


def test_it_ends_with_a_model_its_scores_and_the_next_command(made):
    model, (printed, _) = made
    assert printed.count("1 step") >= 4 and "before, small:" in printed and "after, model:" in printed
    assert printed.endswith("your model: model\n  teasr upscale photo.jpg -o photo_x4.png --model model\n")
    for part in ("before", "heldout"):
        scores = json.loads((model / "eval" / part / "scores.json").read_text())["methods"]
        assert scores["1 step"]["psnr"]["mean"] > 15
    assert Upscaler.from_pretrained(model).scale == 4
    assert re.search("run_name: cats", (model / "config.yaml").read_text())


def test_it_starts_from_the_model_that_comes_with_teasr(made):
    model, _ = made
    ours = load_file(checkpoint_folder.latest(model / "checkpoints") / "weights.safetensors")
    shipped = load_file(assets.find("small") / "ema.safetensors")
    assert ours.keys() == shipped.keys()
    assert max((ours[name].float() - shipped[name].float()).abs().max() for name in ours) < 1e-6


def test_held_out_photographs_are_not_trained_on(made):
    model, _ = made
    train_on, held = ({path.name for path in (model / "photos" / part).iterdir()} for part in ("train", "heldout"))
    assert len(train_on) == 2 and len(held) == 1 and not train_on & held
    opened = ShardSet.open(*(str(model / "shards" / name) for name in ("osediff", "light")))
    assert len(opened) == 80


def test_repeated_it_keeps_everything(made):
    _, (_, again) = made
    assert "already trained: 2/2 updates" in again and again.count("already evaluated") == 2
    assert "prepare" not in again


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["--photos", "nowhere", "--out", "m"], "--photos nowhere is not a folder"),
        (["--photos", "one", "--out", "m"], "holds 1 photograph.* at least 2 are needed"),
        (["--photos", "one", "--out", "m", "--from", "smal"], "--from smal: .* shipped with teasr are"),
        (["--photos", "one"], "--photos needs --out"),
        (["--config", "tiny_teasr", "--out", "m"], "--out requires --photos"),
        (["--config", "tiny_teasr", "--from", "m"], "--from requires --photos"),
    ],
)
def test_mistakes_are_explained(photos, tmp_path, monkeypatch, capsys, arguments, problem):
    (tmp_path / "one").mkdir()
    (tmp_path / "one/chelsea.png").write_bytes((photos / "chelsea.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    try:
        code = train.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and re.search(problem, capsys.readouterr().err)


def test_a_start_that_does_not_fit_is_named(made, tmp_path):
    model, _ = made
    settings = (f"run_dir={tmp_path / 'run'}", f"data.shards={model / 'shards/osediff'}", "preview.every_updates=0")
    done = run("--config", "tiny_teasr", *settings, "data.streams=1", "train.start_from=small", cwd=tmp_path)
    assert done.returncode == 2 and "train.start_from = small cannot be used (" in done.stderr
    assert "Traceback" not in done.stderr
