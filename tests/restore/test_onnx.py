"""onnx_export.py: ONNX Runtime computes what PyTorch does, for both small backbones and pictures of any size."""

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch

from teasr import Upscaler
from teasr.backbones.model import Model
from teasr.commands import export as command
from teasr.restore import onnx_export
from teasr.run_config import load

pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
ort = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

UNET = (
    "backbone.noise_widths=[8,16]", "backbone.condition_widths=[8,16]", "backbone.depth=1", "backbone.trunk_width=8",
    "backbone.trunk_depth=1", "backbone.base=random",
)  # fmt: skip
TINY = ("backbone.base=random", "backbone.width=32", "backbone.depth=2", "backbone.heads=2", "backbone.lora_rank=2")
SIZES = ((24, 32), (17, 41), (3, 50))  # of the low-quality picture; the first one is that of the tracing


def restorer(preset: str, overrides: tuple[str, ...]) -> Upscaler:
    """A network of random weights whose output is not zero."""
    root = Path(__file__).parents[2]
    config = load(root / f"launch/presets/{preset}.yaml", ("data.shards=none", "run_dir=none", *overrides))
    method = config.build_method()
    backbone = config.build_backbone(method.roles()[:1])
    generator = torch.Generator().manual_seed(0)
    backbone.fit([torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1 for _ in range(8)])
    for parameter in backbone.net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, 0, 0.1, generator=generator)
    return Upscaler(Model(backbone), method.sampler(), config)


def inputs(upscaler: Upscaler, height: int, width: int, steps: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(height)
    shape = onnx_export.noise_shape(upscaler, height, width, steps)
    image = torch.rand(1, 3, height, width, generator=generator)
    return {"image": image, "noise": torch.randn(shape, generator=generator)}


def differences(upscaler: Upscaler, file: Path, steps: int = 1) -> list[float]:
    """The largest difference between ONNX Runtime and PyTorch at each size, in the range [0, 1]."""
    session, found = ort.InferenceSession(file, providers=["CPUExecutionProvider"]), []
    for height, width in SIZES:
        given = inputs(upscaler, height, width, steps)
        with torch.no_grad():
            expected = onnx_export.Steps(upscaler, steps)(**given).numpy()
        (made,) = session.run(None, {name: x.numpy() for name, x in given.items()})
        assert made.shape == (1, 3, height * upscaler.scale, width * upscaler.scale) and expected.std() > 0.01
        found.append(float(np.abs(made - expected).max()))
    return found


@pytest.mark.parametrize(("preset", "overrides"), [("unet_teasr", UNET), ("tiny_teasr", TINY)])
def test_the_file_restores_like_pytorch(preset, overrides, tmp_path):
    upscaler = restorer(preset, overrides)
    onnx_export.export(upscaler, tmp_path / "x.onnx")
    assert max(differences(upscaler, tmp_path / "x.onnx")) < 1e-5


@pytest.mark.parametrize(("preset", "overrides", "noises"), [("unet_teasr", UNET, 3), ("tiny_teasr", TINY, 1)])
def test_several_steps_restore_like_pytorch_and_the_sampler(preset, overrides, noises, tmp_path):
    """Restarts take a noise for each step, Algorithm 1 takes one; with the sampler's noises both equal its result."""
    upscaler, file = restorer(preset, overrides), tmp_path / "x.onnx"
    onnx_export.export(upscaler, file, steps=3)
    assert max(differences(upscaler, file, 3)) < 1e-5
    assert ort.InferenceSession(file).get_modelmeta().custom_metadata_map["noises"] == str(noises)
    eps = torch.randn(onnx_export.noise_shape(upscaler, 24, 32), generator=torch.Generator().manual_seed(0))
    one = torch.ones(1)  # state(..) at time 1 is the fresh noise of a restart alone
    fresh = [upscaler.sampler.state(i, torch.zeros_like(eps), one, eps) for i in range(1, noises)]
    image = torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(1))
    given = {"image": image.numpy(), "noise": torch.cat([eps, *fresh]).numpy()}
    (made,) = ort.InferenceSession(file).run(None, given)
    x = torch.nn.functional.interpolate(image, scale_factor=4, mode="bicubic").clamp(0, 1) * 2 - 1
    z = upscaler.sampler.sample(upscaler.model, upscaler.backbone.encode(x), eps, 3)
    expected = (upscaler.backbone.decode(z).clamp(-1, 1) + 1) / 2
    assert np.abs(made - expected.numpy()).max() < 1e-5
    with pytest.raises(ValueError, match="at least 1 step"):
        onnx_export.export(upscaler, file, steps=0)


def test_the_shipped_model_is_exported_by_the_command(tmp_path, capsys):
    """Its weights in fp16; the file says what a program needs to know to make the noise."""
    file = tmp_path / "small.onnx"
    assert command.main(["small", "--onnx", str(file), "--dtype", "fp16"]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.startswith(f"{file}: ")
    upscaler = Upscaler.from_pretrained("small", device="cpu")
    assert max(differences(upscaler, file)) < 1e-5  # the shipped weights are in fp16 already
    facts = ort.InferenceSession(file).get_modelmeta().custom_metadata_map
    expected = {name: str(getattr(upscaler.backbone, name)) for name in onnx_export.FACTS}
    assert facts == expected | {"scale": str(upscaler.scale), "steps": "1", "noises": "1"}


def test_the_graph_is_what_the_upscaler_computes():
    """One step of `Upscaler` with the same noise; its frame was rounded to 255 levels before and after."""
    upscaler = Upscaler.from_pretrained("small", device="cpu")
    picture = np.ascontiguousarray(skimage.data.coffee()[100:124, 200:232])
    noise = torch.randn(onnx_export.noise_shape(upscaler, 24, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        image = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
        made = onnx_export.Steps(upscaler)(image, noise)[0].permute(1, 2, 0).numpy() * 255
    difference = np.abs(made - upscaler(picture, steps=1, seed=0))
    assert difference.mean() < 0.5 and difference.max() < 8, (difference.mean(), difference.max())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to write: give --out FOLDER, --onnx FILE or --push-to-hub"),
        (["--onnx", "x.onnx", "--dtype", "bf16"], "an ONNX file cannot hold weights in bf16: use --dtype fp32 or fp16"),
        (["--out", "x", "--steps", "2"], "--steps is for an ONNX file"),
        (["--onnx", "x.onnx", "--private"], "--private is for a model on the hub: add --push-to-hub"),
        (["--onnx", "x.onnx", "--register", "me"], "--register needs the folder that is registered: add --out"),
    ],
)
def test_mistakes(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main(["small", *arguments]) == 2
    assert message in capsys.readouterr().err and not any(tmp_path.iterdir())
