"""pretrained.py: models from folders, the hub's cache and exports; saving, precisions, offloading, refused input."""

import numpy as np
import pytest
import skimage.data
import torch
from conftest import velocity
from test_lora_file import export, run  # noqa: F401 - fixtures
from test_qwen_image import backbone, model  # noqa: F401 - model is a fixture

from teasr import Upscaler
from teasr.backbones.qwen_image.backbone import QwenImage

PHOTO = np.ascontiguousarray(skimage.data.coffee()[100:140, 200:256])  # 56 x 40


def test_a_model_is_saved_and_loaded(untrained, tmp_path):
    first = Upscaler.from_pretrained(untrained)
    saved = first.save_pretrained(tmp_path / "saved")
    files = {"ema.safetensors", "fixed.safetensors", "config.yaml", "README.md", "MANIFEST.json"}
    assert {p.name for p in saved.iterdir()} == files
    card = (saved / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: teasr\n") and f"--model {saved.name}" in card and "`tiny`" in card
    again = Upscaler.from_pretrained(saved)
    assert np.array_equal(again(PHOTO, steps=2), first(PHOTO, steps=2))
    again.save_pretrained(saved)  # over itself
    assert np.array_equal(Upscaler.from_pretrained(saved)(PHOTO), first(PHOTO))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds other files"):
        first.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="holds no weights"):
        Upscaler.from_pretrained(saved, weights="weights")


def test_a_name_on_the_hub(untrained, tmp_path, monkeypatch):
    """The hub's own code finds the snapshot in its cache; the error without network and cache mentions both."""
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="model someone/small: no such folder exists, and the hub cannot be reached"):
        Upscaler.from_pretrained("someone/small")
    repository, commit = tmp_path / "models--someone--small", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    first = Upscaler.from_pretrained(untrained)
    first.save_pretrained(repository / "snapshots" / commit)
    assert np.array_equal(Upscaler.from_pretrained("someone/small")(PHOTO), first(PHOTO))
    for wrong in ("no/such/folder", "nothing", "../x", "/nowhere/x"):
        with pytest.raises(
            ValueError, match=f"model {wrong}: no such folder exists; the models shipped with teasr are"
        ):
            Upscaler.from_pretrained(wrong)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_precisions_of_the_small_model(untrained, dtype):
    """Only the transformer is rounded: the result is close, but not identical."""
    exact, rounded = (Upscaler.from_pretrained(untrained, dtype=d)(PHOTO, steps=2).astype(float) for d in (None, dtype))
    assert np.abs(rounded - exact).max() > 0 and np.abs(rounded - exact).mean() < 0.5
    with pytest.raises(ValueError, match="dtype fp8: backbone tiny supports fp32, bf16, fp16"):
        Upscaler.from_pretrained(untrained, dtype="fp8")


def test_an_exported_lora_restores_as_its_run(run, export, tmp_path):  # noqa: F811
    assert export([str(run), "--out", str(tmp_path / "exported")]) == 0
    wanted = Upscaler.from_pretrained(run)
    made = Upscaler.from_pretrained(tmp_path / "exported")
    assert np.array_equal(made(PHOTO, steps=2), wanted(PHOTO, steps=2))
    config = wanted.config.backbone
    saved = wanted.save_pretrained(tmp_path / "saved")
    for folder in (tmp_path / "exported", saved):
        assert QwenImage.inference_config(config, None, folder).prompt == str(folder / "prompt.safetensors")
    assert np.array_equal(Upscaler.from_pretrained(saved)(PHOTO, steps=2), wanted(PHOTO, steps=2))
    for dtype, at_most in (("bf16", 3), ("fp8", 8), ("nf4", 20)):
        other = Upscaler.from_pretrained(saved, dtype=dtype)(PHOTO, steps=2)
        assert 0 < np.abs(other.astype(float) - wanted(PHOTO, steps=2)).mean() < at_most, dtype
    with pytest.raises(ValueError, match="dtype fp16: backbone qwen_image supports bf16, fp32, fp8, nf4"):
        Upscaler.from_pretrained(saved, dtype="fp16")


def test_offloaded_blocks_compute_the_same(model, untrained):  # noqa: F811
    """The CPU stands in for the GPU: the weights are copied all the same.

    Loaded weights lie at other addresses than those in the ring, so that products may round differently; with weights
    of equal alignment, no bit changes (tests/backbones/test_swapping.py).
    """
    z = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    t, r, cpu = torch.tensor([0.5]), torch.tensor([0.25]), torch.device("cpu")
    for changes, rounding in (
        ({}, 1e-5),
        ({"quantise": "nf4", "dtype": "bf16"}, 0.1),
        ({"modulation_table": None}, 1e-5),
    ):
        whole, parts = backbone(model, **changes), backbone(model, swap_ring=1, **changes)
        whole.to(cpu)
        parts.offload(cpu)
        with torch.no_grad():
            found = [velocity(parts, z, t, z, r) for _ in range(3)]
            assert (found[0] - velocity(whole, z, t, z, r)).abs().max() < rounding
            parts.drop_training_precision()
            assert {p.dtype for k, p in parts.net.named_parameters() if "lora_" in k} == {parts.net.prompt.dtype}
            found.append(velocity(parts, z, t, z, r))
            assert all(torch.equal(v, found[0]) for v in found)
        assert len(parts.ring.slots) == 1 and parts.ring.copier.copies == 4 * len(parts.net.transformer.blocks)
    with pytest.raises(ValueError, match="does not support offloading"):
        Upscaler.from_pretrained(untrained).backbone.offload(cpu)
    with pytest.raises(ValueError, match="no GPU is visible"):
        Upscaler.from_pretrained(untrained, offload=True)
