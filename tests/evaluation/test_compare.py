"""eval/compare.py: two methods are timed, trained for equal updates and equal time, scored once, and tabulated."""

import json
import subprocess
import sys

import pytest
import warm
import yaml
from conftest import ROOT


@pytest.fixture(scope="module")
def compare():
    sys.path.insert(0, str(ROOT / "eval"))
    try:
        import compare
    finally:
        sys.path.remove(str(ROOT / "eval"))
    return compare


def test_methods_are_trained_for_equal_updates_and_equal_time(compare, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(compare.subprocess, "run", warm.run)
    monkeypatch.setattr(
        compare, "ROWS", {"TEASR": compare.Row("small_teasr", (1, 2)), "CSD (SDS)": compare.Row("small_csd")}
    )
    out = tmp_path / "out"
    command = ["--data", str(shards), "--updates", "2", "--seeds", "3", "--metrics", "psnr", "--timing-updates", "4"]
    command += ["--timing-rounds", "1", "--out", str(out), f"data.shards={shards}", "train.batch=2"]
    command += ["train.micro_batch=2", "backbone.depth=4", "data.augment=none"]
    assert compare.main(command) == 0
    seconds = json.loads((out / "seconds.json").read_text())
    assert set(seconds) == {"TEASR", "CSD (SDS)"} and min(seconds.values()) > 0
    runs = {p.name: yaml.safe_load((p / "config.yaml").read_text()) for p in out.glob("*-seed3")}
    assert set(runs) == {"teasr-equal_updates-seed3", "csd__sds-equal_updates-seed3", "csd__sds-equal_time-seed3"}
    same_time = max(1, round(2 * seconds["TEASR"] / seconds["CSD (SDS)"]))
    assert runs["csd__sds-equal_time-seed3"]["train"]["updates"] == same_time
    text = (out / "comparison.md").read_text()
    for row in (
        "| bicubic |",
        "| TEASR | 1 step | updates | 2 |",
        "| TEASR | 2 steps |",
        "| CSD (SDS) | 1 step | time |",
    ):
        assert text.count(row) == 1, row
    capsys.readouterr()
    assert compare.main([*command, "train.updatez=3"]) == 2 and "updatez" in capsys.readouterr().err


def test_the_table_has_means_and_spreads(compare):
    rows = [
        {"method": "bicubic", "steps": "", "scores": {"psnr": [20.0, 20.0], "lpips": [0.5, 0.5]}},
        {"method": "TEASR", "steps": "1 step", "equal": "updates", "updates": 9, "s": 0.25,
         "scores": {"psnr": [21.0, 23.0], "lpips": [0.3, 0.3]}},
    ]  # fmt: skip
    result = {"data": "d", "pictures": 2, "protocol": "teasr", "clock": "cpu", "commit": "c", "overrides": []}
    text = compare.markdown(result | {"rows": rows})
    assert "| updates | CPU s an update | seeds |" in text
    assert "| bicubic |  |  |  |  |  | 20.00 | 0.5000 |" in text
    assert "| TEASR | 1 step | updates | 9 | 0.25 | 2 | 22.00 ± 1.41 | 0.3000 |" in text


def test_a_training_that_was_stopped_is_not_scored(compare, tmp_path, monkeypatch):
    """A training that is stopped by a signal saves, and exits with 0."""

    def stopped(command):
        (tmp_path / "status").write_text("KILLED\n")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(compare.subprocess, "run", stopped)
    with pytest.raises(ValueError, match=r"stopped early \(KILLED\): run the same command again"):
        compare.train(compare.Row("small_teasr"), tmp_path, 2, 0, [])
