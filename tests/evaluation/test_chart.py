"""eval/chart.py: curves and points lie where their scores are."""

import json
import re
import sys

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def chart():
    sys.path.insert(0, str(ROOT / "eval"))
    try:
        import chart
    finally:
        sys.path.remove(str(ROOT / "eval"))
    return chart


def scores(psnr, dists):
    return {"psnr": {"mean": psnr}, "dists": {"mean": dists}}


def test_a_dial_is_a_curve_and_methods_are_points(chart, tmp_path, capsys):
    rows = {"full": {"bicubic": scores(20, 0.4), "1 step at 0": scores(22, 0.3), "1 step at 1": scores(21, 0.2)}}
    (tmp_path / "curves.json").write_text(json.dumps({"rows": rows}))
    points = [
        {"method": "TEASR", "steps": "1 step", "equal": "updates", "scores": {"psnr": [21, 23], "dists": [0.3, 0.3]}},
        {"method": "TEASR", "steps": "4 steps", "equal": "updates", "scores": {"psnr": [20, 20], "dists": [0.1, 0.1]}},
        {"method": "D3SR", "steps": "1 step", "equal": "time", "scores": {"psnr": [20, 20], "dists": [0.1, 0.1]}},
    ]
    (tmp_path / "points.json").write_text(json.dumps({"rows": points}))
    files = ["--curves", str(tmp_path / "curves.json"), "--points", str(tmp_path / "points.json")]
    assert chart.main([*files, "--out", str(tmp_path / "chart.svg")]) == 0
    text = (tmp_path / "chart.svg").read_text()
    assert text.count("<polyline") == 1 and ">TEASR, 4 steps</text>" in text and "D3SR" not in text
    (faithful, real, one, four) = [tuple(map(float, p)) for p in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', text)]
    assert faithful == one, "22 dB and DISTS 0.3, the mean over seeds"
    assert four[0] < real[0] < one[0], "a higher PSNR lies to the right"
    assert one[1] < real[1] < four[1], "a lower DISTS lies lower"
    assert chart.main([*files, "--rows", "blur", "--out", str(tmp_path / "none.svg")]) == 2
    assert "'blur' is no row of --curves: choose from full" in capsys.readouterr().err
    assert chart.main(["--out", str(tmp_path / "none.svg")]) == 2 and "--points" in capsys.readouterr().err


def test_a_model_has_a_curve_for_steps_and_one_for_the_dial(chart, tmp_path):
    methods = {"bicubic": scores(20, 0.4), "1 step": scores(21, 0.3), "2 steps": scores(20.5, 0.2)}
    methods |= {"1 step at 0": scores(22, 0.35), "1 step at 1": scores(21.5, 0.32)}
    (tmp_path / "scores.json").write_text(json.dumps({"methods": methods}))
    made = tmp_path / "chart.svg"
    assert chart.main(["--models", f"mine={tmp_path / 'scores.json'}", "--out", str(made)]) == 0
    text = made.read_text()
    assert text.count("<polyline") == 2
    assert all(f">{name}</text>" in text for name in ("mine, steps", "mine, strength of 1 step", "bicubic"))
    with pytest.raises(SystemExit):
        chart.main(["--models", "scores.json", "--out", str(made)])


def test_a_dozen_lines_have_a_colour_each(chart):
    colors = [color for _, color in chart.colored({str(i): [] for i in range(12)})]
    assert len(set(colors)) == 12
