"""eval/ablate.py: the rows are trained and scored once, and the reported conclusions follow from the numbers."""

import json
import sys

import pytest
import warm
import yaml
from conftest import ROOT, small_recipe

from teasr.util.distributed import free_port


@pytest.fixture(scope="module")
def ablate():
    sys.path.insert(0, str(ROOT / "eval"))
    try:
        import ablate
    finally:
        sys.path.remove(str(ROOT / "eval"))
    return ablate


def test_rows_are_trained_and_scored_once(ablate, shards, tmp_path, monkeypatch, capsys):
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(small_recipe(shards, tmp_path / "unused", "zero1", train__updates=2)))
    launcher = f"deepspeed --num_gpus 1 --master_port {free_port()}"
    command = [
        "--config",
        config,
        "--data",
        shards,
        "--seeds",
        3,
        "--steps",
        1,
        "--launcher",
        launcher,
        "--out",
        tmp_path / "out",
    ]
    command = [str(part) for part in command]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ablate.subprocess, "run", warm.run)
    for round_ in range(2):
        assert ablate.main(command) == 0
        out = capsys.readouterr().out
        assert out.count("already trained") == out.count("already evaluated") == 3 * round_
    runs = {p.name: yaml.safe_load((p / "config.yaml").read_text()) for p in (tmp_path / "out").iterdir() if p.is_dir()}
    assert {
        name: (r["backbone"]["decoupled_timestep"], r["method"]["time_aware"], r["seed"]) for name, r in runs.items()
    } == {
        "fused_timesteps-seed3": (False, False, 3), "plus_DTC-seed3": (True, False, 3),
        "plus_DTC_plus_TAR-seed3": (True, True, 3),
    }  # fmt: skip
    told = json.loads((tmp_path / "out/ablation.json").read_text())
    assert list(told["rows"]) == ["fused timesteps", "+ DTC", "+ DTC + TAR"] and len(told["comparisons"]) == 2
    assert "| + DTC + TAR | 1 step |" in (tmp_path / "out/ablation.md").read_text()
    assert "| + DTC + TAR | 0 | " in (tmp_path / "out/ablation.md").read_text(), "no update was skipped"
    assert ablate.main([*command, "train.updatez=3"]) == 2
    assert "updatez" in capsys.readouterr().err


def test_a_dial_is_scored_at_its_strengths(ablate, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ablate.subprocess, "run", warm.run)
    monkeypatch.setitem(ablate.ROWS, "tadsr", {"blur alone": ablate.ROWS["tadsr"]["blur alone"]})
    command = ["--config", "small_tadsr", "--rows", "tadsr", "--data", str(shards), "--seeds", "3", "--steps", "1"]
    command += ["--strengths", "0", "0.5", "--metrics", "psnr", "energy", "--launcher", sys.executable]
    command += ["--out", str(tmp_path), f"data.shards={shards}", "data.augment=none", "train.updates=1"]
    command += ["train.batch=2", "train.micro_batch=2", "preview.every_updates=0", "tracking.mlflow=false"]
    assert ablate.main(command) == 0
    told = json.loads((tmp_path / "ablation.json").read_text())["rows"]["blur alone"]
    assert set(told) == {"bicubic", "1 step", "1 step at 0", "1 step at 0.5"}
    assert told["1 step at 0"]["energy"]["mean"] != told["1 step at 0.5"]["energy"]["mean"]


def test_steadiness_is_read_from_the_log(ablate, tmp_path):
    rows = [f"{i},{'' if i < 15 else 0.5},{int(i == 3)},{9 if i == 0 else 4 if i == 12 else 2}" for i in range(20)]
    (tmp_path / "metrics.csv").write_text("update,rectify_to_data,skipped,grad_norm\n" + "\n".join(rows))
    told = ablate.steadiness(tmp_path / "metrics.csv")
    assert told == {"skipped": 1, "grad_norm": 2, "rectify_to_data": 0.5, "checkerboard": None}


def test_comparisons_say_what_the_seeds_say(ablate):
    def row(psnr, niqe):
        return {
            "1 step": {"psnr": {"values": psnr}, "niqe": {"values": niqe}},
            "bicubic": {"psnr": {"values": [1, 1, 1]}},
        }

    rows = {"a": row([20.0, 21.0, 22.0], [5.0, 5.0, 5.0]), "b": row([20.5, 21.4, 22.6], [5.5, 4.9, 5.1])}
    found = ablate.compare(rows, "a", "b")
    assert list(found["gains"]) == ["1 step"]
    psnr, niqe = found["gains"]["1 step"]["psnr"], found["gains"]["1 step"]["niqe"]
    assert psnr["gain"] == pytest.approx(0.5) and psnr["deviation"] == pytest.approx(0.1) and psnr["seeds_for"] == 3
    assert niqe["gain"] == pytest.approx(-1 / 6) and niqe["seeds_for"] == 1  # lower is better
    assert (
        "In 1 of 2 comparisons b is better with every seed, in 0 it is worse with every seed, "
        "and in 1 the seeds disagree." in ablate.verdict(found)
    )
