"""lora_file.py and launch/export.py: exporting and loading a trained LoRA, reading it in diffusers, refused files."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, small_recipe
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from test_qwen_image import backbone, config, model  # noqa: F401 - model is a fixture
from test_training import start

from teasr import Upscaler
from teasr.backbones import lora_file
from teasr.backbones.qwen_image.transformer import pack


@pytest.fixture(scope="module")
def export():
    sys.path.insert(0, str(ROOT / "launch"))
    try:
        import export
    finally:
        sys.path.remove(str(ROOT / "launch"))
    return export.main


@pytest.fixture(scope="module")
def run(model, shards, tmp_path_factory):  # noqa: F811
    """Two updates of the tiny random model, with a learning rate large enough for the LoRA to have an effect."""
    folder = tmp_path_factory.mktemp("export")
    common = {"backbone": config(model), "train__updates": 2, "train__learning_rate": 0.1}
    start([small_recipe(shards, folder / "run", **common)], folder, 1)
    return folder / "run"


def test_a_trained_lora_loads_back_bit_for_bit(run, model, export, tmp_path, capsys):  # noqa: F811
    assert export([str(run), "--out", str(tmp_path)]) == 0
    assert "MB" in capsys.readouterr().out
    trained = load_file(run / "checkpoints/step-00000002/ema.safetensors")
    loaded = {n: p for n, p in backbone(model, lora=str(tmp_path)).net.named_parameters() if p.requires_grad}
    assert trained.keys() == loaded.keys() and all(torch.equal(trained[n], loaded[n]) for n in trained)
    assert any("lora_B" in n and x.abs().max() > 0 for n, x in trained.items())
    assert export([str(run), "--out", str(tmp_path / "half"), "--dtype", "bf16", "--weights", "weights"]) == 0
    assert (tmp_path / "half" / lora_file.NAME).stat().st_size < 0.7 * (tmp_path / lora_file.NAME).stat().st_size
    card = (tmp_path / "README.md").read_text()
    assert "in 1 to 30 sampling steps" in card and "any-step]" in card and "--steps 4" in card
    assert "condition tokens only" in card and "after 2 updates" in card and f"base_model: {model}" in card


def test_diffusers_reads_it_and_would_apply_it_to_all_tokens(run, model, export, tmp_path):  # noqa: F811
    """The reason for the card's warning: the stock model's output changes, ours without a condition does not."""
    export([str(run), "--out", str(tmp_path)])
    stock = QwenImageTransformer2DModel.from_pretrained(model / "transformer")
    ours = backbone(model, lora=str(tmp_path), modulation_table=None).net.transformer
    z, text, t = torch.randn(1, 16, 8, 12), torch.randn(1, 5, 48), torch.tensor([0.5])
    x = pack(z)
    with torch.no_grad():
        before = stock(x, text, None, t, [[(1, 4, 6)]], return_dict=False)[0]
        assert torch.equal(pack(ours(z, t, text)), before)
        stock.load_lora_adapter(tmp_path, weight_name=lora_file.NAME, prefix="transformer")
        names = [n for n, _ in stock.named_parameters() if "lora_" in n]
        assert len(names) == len(load_file(tmp_path / lora_file.NAME))
        assert not torch.allclose(stock(x, text, None, t, [[(1, 4, 6)]], return_dict=False)[0], before, atol=1e-3)


def test_what_does_not_fit_is_refused(run, model, export, tmp_path, capsys):  # noqa: F811
    export([str(run), "--out", str(tmp_path / "lora")])
    for change, message in [
        ({"rope": "frame_offset"}, "has rope = shared, but this config has rope = frame_offset"),
        ({"lora_rank": 8, "lora_alpha": 8}, "has lora_rank = 4, but this config has lora_rank = 8"),
    ]:
        with pytest.raises(ValueError, match=message):
            backbone(model, lora=str(tmp_path / "lora"), **change)
    with pytest.raises(ValueError, match="cannot be read"):
        backbone(model, lora=str(tmp_path / "none"))
    save_file({"a": torch.zeros(1)}, tmp_path / "alien.safetensors")
    with pytest.raises(ValueError, match="not made by teasr"):
        backbone(model, lora=str(tmp_path / "alien.safetensors"))
    weights, story = lora_file.read(tmp_path / "lora")
    weights.pop(next(iter(weights)))
    lora_file.write(tmp_path / "less", weights, {}, story)
    with pytest.raises(ValueError, match="missing, unknown or of another shape"):
        backbone(model, lora=str(tmp_path / "less"))
    assert export([str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert "neither a checkpoint nor a run folder" in capsys.readouterr().err
    assert not (tmp_path / "x").exists() and json.dumps(story)


def test_a_small_model_is_exported_whole_and_registered(untrained, export, tmp_path, capsys, monkeypatch):
    """Registered versions in a sqlite store each contain the files needed for restoring."""
    import mlflow
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for version in (1, 2):
        assert export([str(untrained), "--out", str(tmp_path / "out"), "--register", "small"]) == 0
        assert f"small, version {version}, {uri}" in capsys.readouterr().out
    client = MlflowClient(uri)
    found = client.get_model_version("small", "2")
    assert found.tags == {"backbone": "tiny", "updates": "1", "commit": "none"}
    assert found.source == client.get_model_version("small", "1").source  # both versions have the same content
    photo = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    expected = Upscaler.from_pretrained(untrained)(photo)
    assert np.array_equal(Upscaler.from_pretrained(tmp_path / "out")(photo), expected)
    assert np.array_equal(mlflow.pyfunc.load_model("models:/small/2").predict(photo[None])[0], expected)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert export([str(untrained), "--out", str(tmp_path / "out"), "--register", "small"]) == 2
    assert "MLflow at http://127.0.0.1:9 did not accept the model" in capsys.readouterr().err
