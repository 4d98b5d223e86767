"""evaluation.py, data/pairs.py and eval/benchmark.py: scores do not depend on interruptions or the number of ranks.

Mistakes are reported by name.
"""

import csv
import json
import os
import sys

import numpy as np
import pytest
import skimage.data
import warm
from conftest import ROOT
from PIL import Image

from teasr.data import pairs as pairs_of
from teasr.evaluation.benchmark import Evaluation, table
from teasr.evaluation.metrics import Scorer
from teasr.evaluation.names import steps_of
from teasr.imaging import images
from teasr.imaging.exact_metrics import psnr
from teasr.util.distributed import free_port

BENCHMARK = str(ROOT / "eval/benchmark.py")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Originals of 96 x 64 px with their LQ, 5 of each, two of them in a sub-folder."""
    root = tmp_path_factory.mktemp("pairs")
    photo = skimage.data.coffee()
    for i in range(5):
        name = f"sub/{i}" if i > 2 else str(i)
        hq = photo[20 * i : 20 * i + 64, 60 * i : 60 * i + 96]
        for kind, x in (("hq", hq), ("lq", hq[2::4, 2::4])):
            (root / kind / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x).save(root / kind / f"{name}.png")
    return root


def benchmark(*arguments, **environment):
    done = warm.run(
        [sys.executable, BENCHMARK, *map(str, arguments)],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def counted(pairs, out, rank=0, world=1, stop_after=None):
    """An evaluation with nearest-neighbour upscaling that counts the images it makes, and may be interrupted."""
    made = []

    def restore(sample):
        if stop_after is not None and len(made) >= stop_after:
            raise KeyboardInterrupt
        made.append(sample.key)
        return np.kron(sample.lq, np.ones((4, 4, 1), np.uint8))

    scorer = Scorer(["psnr", "ssim"])
    return Evaluation(pairs, scorer, out, {"nearest": restore}, {"seed": 0}, rank=rank, world=world), made


def test_pairs_of_folders_and_of_originals_alone(folders):
    given = {key: load() for key, load in pairs_of.from_folders(folders / "hq", folders / "lq")}
    assert list(given) == ["0", "1", "2", "sub/3", "sub/4"]
    assert given["sub/4"].hq.shape == (64, 96, 3) and given["sub/4"].lq.shape == (16, 24, 3)
    made = {key: load() for key, load in pairs_of.from_folders(folders / "hq", None, scale=3)}
    assert made["0"].hq.shape == (63, 96, 3) and made["0"].lq.shape == (21, 32, 3)
    assert psnr(made["0"].lq_up, made["0"].hq) > 18


def test_what_is_not_whole_is_named(folders, tmp_path):
    hq, lq = folders / "hq", folders / "lq"
    (tmp_path / "lq").mkdir()
    Image.open(lq / "0.png").save(tmp_path / "lq/0.png")
    for wrong, message in (
        (lambda: pairs_of.from_folders(hq, tmp_path / "lq"), "lq has no image 1"),
        (lambda: pairs_of.from_folders(hq, lq, count=7), "hq contains 5 images, but the set has 7"),
        (lambda: pairs_of.from_folders(tmp_path / "none", lq), "none is not a folder"),
        (lambda: [load() for _, load in pairs_of.from_folders(hq, lq, scale=2)], "must be 2 times those of"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    Image.open(lq / "0.png").save(tmp_path / "lq/0.jpg")
    with pytest.raises(ValueError, match="one file of each name"):
        pairs_of.from_folders(tmp_path / "lq", None)


def test_stopped_and_started_again_nothing_is_made_twice(folders, tmp_path):
    pairs = pairs_of.from_folders(folders / "hq", folders / "lq")
    whole, made = counted(pairs, tmp_path / "whole")
    whole.run()
    assert made == ["0", "1", "2", "sub/3", "sub/4"]
    first, made = counted(pairs, tmp_path / "halves", stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert not (tmp_path / "halves/scores.json").exists() and len(made) == 3
    second, made = counted(pairs, tmp_path / "halves")
    second.run()
    assert made == ["sub/3", "sub/4"]
    for name in ("scores.json", "scores_by_picture.csv", "comparison.png", "extremes.png"):
        assert (tmp_path / "halves" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    rows = list(csv.DictReader((tmp_path / "whole/scores_by_picture.csv").read_text().splitlines()))
    assert len(rows) == 10 and {row["method"] for row in rows} == {"bicubic", "nearest"}
    x = images.read_rgb(second.image_path("nearest", "sub/3"))
    assert float(rows[7]["psnr"]) == pytest.approx(psnr(x, images.read_rgb(folders / "hq/sub/3.png")))
    mean = whole.scores["methods"]["nearest"]["psnr"]
    assert mean["mean"] == pytest.approx(np.mean([float(r["psnr"]) for r in rows if r["method"] == "nearest"]))
    assert mean["low"] < mean["mean"] < mean["high"]
    base = whole.scores["methods"]["bicubic"]["psnr"]["mean"]
    assert mean["gain_mean"] == pytest.approx(mean["mean"] - base)
    assert (
        mean["gain_low"] < mean["gain_mean"] < mean["gain_high"]
        and mean["gain_high"] - mean["gain_low"] < mean["high"] - mean["low"]
    )


def test_other_settings_use_nothing_stale(folders, tmp_path):
    pairs = pairs_of.from_folders(folders / "hq", folders / "lq")
    counted(pairs, tmp_path)[0].run()
    other, made = counted(pairs, tmp_path)
    other = Evaluation(pairs, Scorer(["psnr"], "rgb"), tmp_path, other.methods, {"seed": 0})
    other.run()
    assert made == [] and other.scores["protocol"] == "rgb"  # the same images, scored again
    other = Evaluation(pairs, Scorer(["psnr"]), tmp_path, other.methods, {"seed": 1})
    other.run()
    assert len(made) == 5 and len(list(tmp_path.glob("images-*"))) == 1  # new images were made and the old ones removed


def test_a_model_on_one_rank_and_on_two(untrained, folders, tmp_path):
    """Through the command, with torchrun starting the ranks; then the same again, and again with more steps."""
    common = [untrained, "--data", f"{folders / 'lq'}:{folders / 'hq'}", "--metrics", "psnr", "ssim"]
    code, out, err = benchmark(*common, "--steps", 1, 2, "--out", tmp_path / "one")
    assert code == 0, err
    assert "hq, 5 images, protocol osediff" in out and "2 steps" in out
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={free_port()}",
        BENCHMARK,
    ]
    command += [*map(str, common), "--steps", "1", "2", "--out", str(tmp_path / "two")]
    done = warm.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("scores.json", "scores_by_picture.csv", "comparison.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    speed = json.loads((tmp_path / "two/speed.json").read_text())
    assert speed["ranks"] == 2 and speed["methods"]["1 step"]["seconds_median"] > 0
    code, out, _ = benchmark(*common, "--steps", 1, 2, "--out", tmp_path / "one")
    assert code == 0 and "already evaluated" in out
    kept = next((tmp_path / "one").glob("images-*/1_step/0.png")).stat().st_mtime_ns
    code, out, _ = benchmark(*common, "--steps", 1, 2, 4, "--out", tmp_path / "one")
    assert code == 0 and "4 steps" in out
    assert next((tmp_path / "one").glob("images-*/1_step/0.png")).stat().st_mtime_ns == kept


def test_predictions_of_anything_else(folders, tmp_path):
    for path in sorted((folders / "lq").rglob("*.png")):
        target = tmp_path / "theirs" / path.relative_to(folders / "lq")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).resize((96, 64), Image.BICUBIC).save(target)
    common = [
        "--predictions",
        tmp_path / "theirs",
        "--hq",
        folders / "hq",
        "--name",
        "theirs",
        "--out",
        tmp_path / "out",
    ]
    code, out, err = benchmark(*common, MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    assert code == 0, err
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert list(scores["methods"]) == ["theirs"] and "LPIPS skipped: " in out
    first = psnr(images.read_rgb(tmp_path / "theirs/0.png"), images.read_rgb(folders / "hq/0.png"))
    rows = list(csv.DictReader((tmp_path / "out/scores_by_picture.csv").read_text().splitlines()))
    assert float(rows[0]["psnr"]) == pytest.approx(first)
    (tmp_path / "theirs/0.png").unlink()
    code, _, err = benchmark(*common)
    assert code == 2 and "theirs has no image 0" in err


def test_mistakes(untrained, folders, tmp_path):
    for arguments, message in (
        ([], "give either a model with --data, or --predictions"),
        ([untrained], "--data is missing"),
        (
            [untrained, "--data", "RealSR"],
            "data/eval/RealSRVal_crop128/test_HR does not exist. Get it from StableSR-TestSets",
        ),
        ([untrained, "--data", tmp_path], "holds no index.json"),
        ([untrained, "--data", tmp_path, "--metrics", "vmaf"], "metric vmaf does not exist"),
        ([untrained, "--data", tmp_path, "--metrics", "niqe", "--require", "--metric-weights", tmp_path], "niqe: "),
        (["--predictions", tmp_path], "--predictions needs --hq"),
    ):
        code, _, err = benchmark(*arguments)
        assert code == 2 and message in err, arguments


def test_table_and_names():
    assert steps_of("1 step") == 1 and steps_of("30 steps") == 30
    assert steps_of("bicubic") is None and steps_of("2 fast") is None
    scorer = Scorer(["psnr", "ssim"])
    row = {"psnr": {"mean": 23.4567}, "ssim": {"mean": 0.65432}}
    assert table({"metrics": scorer.identity, "methods": {"1 step": row}}).splitlines()[1].split() == [
        "1",
        "step",
        "23.46",
        "0.6543",
    ]
