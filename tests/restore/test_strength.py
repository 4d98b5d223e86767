"""The dial `strength` of TADSR and of TEASR with a coarse restoration, everywhere where it can be turned."""

import json

import numpy as np
import pytest
import skimage.data
import torch
from conftest import small_recipe
from PIL import Image
from test_tiny import make as tiny

from teasr import cli
from teasr.backbones.model import Model
from teasr.config.settings import PreviewConfig
from teasr.data.shards import ShardSet
from teasr.imaging import images
from teasr.imaging.exact_metrics import luma, psnr
from teasr.restore import onnx_export
from teasr.restore.mlflow_flavor import Restorer
from teasr.restore.pipeline import TeasrPipeline
from teasr.restore.upscaler import Upscaler
from teasr.restore.web import page
from teasr.run_config import parse
from teasr.training.preview import Preview
from teasr.util.seed import seed_of

PHOTO = np.ascontiguousarray(skimage.data.coffee()[100:164, 200:264])
LQ = np.ascontiguousarray(PHOTO[2::4, 2::4])


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory):
    """A student of TADSR that was never trained but whose encoder and LoRA have an effect."""
    folder = tmp_path_factory.mktemp("tadsr")
    method = {"name": "tadsr", "lambda_lpips": 0.0}
    config = parse(small_recipe(folder, folder / "run", method=method, backbone__train="lora", backbone__base="random"))
    made = config.build_method()
    backbone = config.build_backbone(roles=made.roles()[:1])
    g = torch.Generator().manual_seed(0)
    backbone.fit([torch.rand(2, 3, 64, 64, generator=g) * 2 - 1 for _ in range(8)])
    for name, p in backbone.net.named_parameters():
        if "lora_B" in name or "encoder.last" in name:
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.1)
    return Upscaler(Model(backbone, made.roles()[0]), made.sampler(), config)


@pytest.fixture(scope="module")
def folder(upscaler, tmp_path_factory):
    return upscaler.save_pretrained(tmp_path_factory.mktemp("export") / "model")


def test_an_export_keeps_it_and_the_command_sets_it(upscaler, folder, tmp_path, capsys):
    loaded = Upscaler.from_pretrained(folder)
    (dial,) = loaded.descriptor.dials
    assert (dial.name, dial.default, loaded.descriptor.step_counts) == ("strength", 0.62, (1,))
    at = {s: upscaler(LQ, dials={"strength": s}) for s in (0.1, 0.62, 0.9)}
    assert np.abs(at[0.1].astype(int) - at[0.9]).max() > 2
    assert np.array_equal(loaded(LQ), at[0.62]) and np.array_equal(loaded(LQ, dials={"strength": 0.9}), at[0.9])
    Image.fromarray(LQ).save(tmp_path / "a.png")
    command = ["upscale", str(tmp_path / "a.png"), "--model", str(folder)]
    assert cli.main([*command, "-o", str(tmp_path / "b.png"), "--strength", "0.9"]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), at[0.9])
    for more, message in (
        (["--strength", "1.5"], "strength = 1.5: must be between 0 and 1"),
        (["--fidelity", "0.5"], "no setting fidelity: its settings are strength"),
        (["--steps", "2", "--strength", "0.5"], "TADSR restores in 1 step"),
        (["--model", "small", "--steps", "2", "--strength", "0.5"], "strength sets how far one step goes: use 1 step"),
    ):
        assert cli.main([*command, "-o", str(tmp_path / "c.png"), *more]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="starts from the LQ picture"):
        onnx_export.export(upscaler, tmp_path / "a.onnx")


def test_the_benchmark_scores_each_strength(upscaler, folder, tmp_path, capsys):
    for name, x in (("lq", LQ), ("hq", PHOTO)):
        (tmp_path / name).mkdir()
        Image.fromarray(x).save(tmp_path / name / "0.png")
    command = ["benchmark", str(folder), "--data", f"{tmp_path / 'lq'}:{tmp_path / 'hq'}", "--metrics", "psnr"]
    command += ["--steps", "1", "--protocol", "rgb", "--out", str(tmp_path / "out"), "--strengths"]
    assert cli.main([*command, "0.1", "0.9"]) == 0
    found = json.loads((tmp_path / "out/scores.json").read_text())["methods"]
    assert list(found) == ["bicubic", "1 step", "1 step at 0.1", "1 step at 0.9"]
    for s in (0.1, 0.9):
        x = upscaler(LQ, dials={"strength": s}).astype(float)
        wanted = 10 * np.log10(255**2 / np.square(x - PHOTO).mean())
        assert found[f"1 step at {s}"]["psnr"]["mean"] == pytest.approx(wanted, abs=1e-3)
    assert cli.main([*command, "0.1", "2"]) == 2
    assert "--strengths 2: must be between 0 and 1" in capsys.readouterr().err


def test_previews_show_the_default_and_both_ends(upscaler, shards):
    preview = Preview(PreviewConfig(pictures=1, steps=(1,)), ShardSet.open(str(shards)), 0)
    sheet, scores = preview.make(upscaler.model, upscaler.sampler, torch.device("cpu"))
    assert sheet.startswith(b"\x89PNG")
    assert set(scores) == {f"preview/{m}_1{end}" for m in ("psnr_y", "ssim_y") for end in ("", "_at_0.1", "_at_0.9")}
    (sample,) = preview.samples
    for end, dials in (("", None), ("_at_0.9", {"strength": 0.9})):
        restored = upscaler(sample.lq, seed=seed_of(0, "preview", sample.key), dials=dials)
        assert scores[f"preview/psnr_y_1{end}"] == pytest.approx(psnr(restored, sample.hq), abs=0.05)


def test_one_step_of_teasr_goes_from_the_coarse_restoration_to_more_detail():
    """At strength 0 it is the coarse restoration; the noise of higher strengths adds high frequencies, in tiles too."""
    small = Upscaler.from_pretrained("small", device="cpu")
    assert {dial.name: dial.default for dial in small.descriptor.dials} == {"fidelity": 0.0, "strength": None}
    x = images.to_tensor(images.resize(LQ, 64, 64))[None]
    coarse = images.to_uint8(small.model.decode(small.model.coarse(small.model.encode(x))[0])[0])
    assert np.abs(small(LQ, strength=0).astype(int) - coarse).max() <= 1
    at = [small(LQ, strength=s) for s in (0.0, 0.25, 0.5, 0.75, 1.0)]
    energy = [np.square(np.diff(luma(y), axis=1)).mean() for y in at]
    assert energy == sorted(energy) and energy[-1] > 1.1 * energy[0]
    assert not any(np.array_equal(small(LQ), y) for y in at)
    tiled, whole = (small(PHOTO, strength=1.0, tile_px=px).astype(float) for px in (128, 256))
    assert 0 < np.abs(tiled - whole).mean() < 1
    done = []
    small(PHOTO, strength=1.0, tile_px=128, on_progress=lambda part, of: done.append((part, of)))
    assert done[-1][0] == done[-1][1] == len(done)
    seen = []
    small(LQ, strength=1.0, on_step=lambda i, of, z: seen.append((i, of)))
    assert seen == [(1, 1)]
    for steps in (2, "auto"):
        with pytest.raises(ValueError, match="use 1 step, or fidelity with several"):
            small(LQ, steps, strength=0.5)
    without = Upscaler(Model(tiny()), small.sampler)
    with pytest.raises(ValueError, match="this model has no setting strength: its settings are fidelity"):
        without(LQ, strength=0.5)


def test_other_programs_turn_it_too(upscaler, tmp_path):
    """The pipeline in diffusers' manner, the model in MLflow and the page: same pictures, same sentence without it."""
    wanted = upscaler(LQ, dials={"strength": 0.9})
    pipe = TeasrPipeline(upscaler)
    pipe.set_progress_bar_config(disable=True)
    assert np.array_equal(np.asarray(pipe(Image.fromarray(LQ), strength=0.9).images[0]), wanted)
    assert np.array_equal(Restorer(upscaler).predict(LQ[None], {"strength": 0.9})[0], wanted)
    assert np.array_equal(Restorer(upscaler).predict(LQ[None], {"strength": None})[0], upscaler(LQ))
    without = Upscaler(Model(tiny()))
    sentence = "this model has no setting strength: its settings are fidelity"
    for act in (
        lambda: TeasrPipeline(without)(Image.fromarray(LQ), strength=0.9),
        lambda: Restorer(without).predict(LQ[None], {"strength": 0.9}),
    ):
        with pytest.raises(ValueError, match=sentence):
            act()
    for model, shown in ((upscaler, False), (without, True)):
        text = str(page.build(model, tmp_path).get_config_file())
        assert (sentence[5:] in text) == shown


def test_previews_of_teasr_show_both_ends_for_one_step_only(shards):
    small = Upscaler.from_pretrained("small", device="cpu")
    preview = Preview(PreviewConfig(pictures=1, steps=(1, 2)), ShardSet.open(str(shards)), 0)
    _, scores = preview.make(small.model, small.sampler, torch.device("cpu"))
    assert set(scores) == {f"preview/{m}_{end}" for m in ("psnr_y", "ssim_y") for end in ("1", "1_at_0", "1_at_1", "2")}
