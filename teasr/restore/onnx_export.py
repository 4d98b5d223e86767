"""Export a small model with its number of steps to ONNX, for programs without PyTorch: browsers, C++, mobile phones.

The graph has two inputs. `image` [1, 3, h, w] is the low-quality picture in [0, 1], of any size; `noise` is Gaussian
noise [N, C, h', w'] of the size that `noise_shape` returns: one, or one for each step of a sampler with restarts. It
has one output, `restored` [1, 3, scale h, scale w] in [0, 1]. Enlarging, codec and padding are part of the graph.

The noise is an input because only then a result can be repeated, compared with PyTorch's, and made of tiles that see
parts of one noise: random numbers that ONNX draws itself differ between programs.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teasr.backbones.model import Condition
from teasr.diffusion import flow
from teasr.methods.sampler import Restarts
from teasr.restore.upscaler import Upscaler
from teasr.util.optional import check_installed, needed_for

BACKBONES = ("tiny", "unet")
DTYPES = ("fp32", "fp16")  # in which the weights can be stored; the graph computes in fp32
FACTS = ("pixel_multiple", "downsample", "latent_channels", "tile_px")  # of the backbone, in the file's metadata
OPSET = 20
SMALL = 1024  # tensors with fewer values stay in fp32
EXAMPLE_PX = (24, 32)  # size of the picture with which the network is traced


class Steps(nn.Module):
    """The whole way of a picture in a number of steps, as the model's sampler takes it."""

    def __init__(self, upscaler: Upscaler, steps: int = 1):
        """upscaler: a model of one of `BACKBONES`. Raises ValueError for a number of steps that it does not have."""
        super().__init__()
        upscaler.sampler.check(steps)
        self.net, self.codec = upscaler.backbone.network, upscaler.backbone.codec
        self.model, self.scale, self.times = upscaler.model, upscaler.scale, upscaler.sampler.times(steps)
        self.restarts = isinstance(upscaler.sampler, Restarts)
        self.noises = steps if self.restarts else 1

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        """image [1, 3, h, w] in [0, 1], noise [noises, C, h', w'] -> [1, 3, scale h, scale w] in [0, 1]."""
        height, width = image.shape[-2] * self.scale, image.shape[-1] * self.scale
        x = F.interpolate(image, size=(height, width), mode="bicubic").clamp(0, 1) * 2 - 1
        z_lq = self.codec.encode(x[:, :, self._padded(height)][:, :, :, self._padded(width)])
        z = noise[:1]
        for i, times in enumerate(self.times):
            t, r = (torch.full((1,), time, device=image.device) for time in times)
            if i and self.restarts:
                z = flow.interpolate(z, noise[i : i + 1], t)
            z = flow.step(z, self.model.velocity(z, t, Condition(z_lq, r)), t, r)
        restored = self.codec.decode(z)[:, :, :height, :width]
        return (restored.clamp(-1, 1) + 1) / 2

    def _padded(self, length: int) -> Tensor:
        """Indices 0 .. length - 1, of which the last one is repeated up to a multiple of `pixel_multiple`."""
        multiple = self.model.pixel_multiple
        return torch.arange((length + multiple - 1) // multiple * multiple).clamp(max=length - 1)


def noise_shape(upscaler: Upscaler, height: int, width: int, steps: int = 1) -> tuple[int, int, int, int]:
    """Return the shape of the graph's noise for a low-quality picture of height x width px."""
    multiple, per_pixel = upscaler.backbone.pixel_multiple, upscaler.backbone.downsample
    sides = (-(-side * upscaler.scale // multiple) * multiple // per_pixel for side in (height, width))
    return (Steps(upscaler, steps).noises, upscaler.backbone.latent_channels, *sides)


def export(upscaler: Upscaler, path: Path, dtype: str = "fp32", steps: int = 1) -> None:
    """Write a model that restores in so many steps to an ONNX file, atomically.

    dtype: fp16 halves the file: weights are stored in it, and the graph still computes in fp32. The metadata of the
    file says what a program needs to know: scale, `FACTS`, steps and the number of noises. Raises ValueError for a
    backbone, a dtype or a number of steps that cannot be exported, and if the packages of the extra `onnx` are missing.
    """
    name = "" if upscaler.config is None else upscaler.config.backbone_name
    if name not in BACKBONES:
        raise ValueError(f"the backbone {name} cannot be exported to ONNX: only {' and '.join(BACKBONES)} can")
    role = upscaler.model.role
    if role.branches != "dual" or role.encoder:
        raise ValueError(
            "only a model that starts from noise can be exported to ONNX, and this one starts from the LQ picture: "
            "export it without --onnx"
        )
    if dtype not in DTYPES:
        raise ValueError(f"an ONNX file cannot hold weights in {dtype}: use --dtype fp32 or fp16")
    with needed_for("exporting to ONNX"):
        import onnx
    check_installed("onnxscript", "exporting to ONNX")
    module = Steps(upscaler, steps).cpu().eval()
    made = _traced(module, (torch.rand(1, 3, *EXAMPLE_PX), torch.randn(noise_shape(upscaler, *EXAMPLE_PX, steps))))
    if dtype == "fp16":
        _store_in_fp16(made)
    backbone = upscaler.backbone
    facts = {name: getattr(backbone, name) for name in FACTS}
    facts |= {"scale": upscaler.scale, "steps": steps, "noises": module.noises}
    onnx.helper.set_model_props(made, {name: str(fact) for name, fact in facts.items()})
    onnx.checker.check_model(made)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_bytes(made.SerializeToString())
    os.replace(temporary, path)


def _traced(module: Steps, inputs: tuple[Tensor, Tensor]):
    """Return the graph as an onnx.ModelProto whose heights and widths are dynamic."""
    sides = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            input_names=["image", "noise"],
            output_names=["restored"],
            dynamic_shapes={"image": sides, "noise": sides},
            opset_version=OPSET,
            verbose=False,
        )
    made = program.model_proto
    for value, name in ((made.graph.input[0], "h"), (made.graph.input[1], "h_noise"), (made.graph.output[0], "h_x")):
        height, width = value.type.tensor_type.shape.dim[2:]
        height.dim_param, width.dim_param = name, name.replace("h", "w")
    return made


def _store_in_fp16(made) -> None:
    """Replace large fp32 weights of an onnx.ModelProto by fp16 ones and casts, which a program undoes at loading."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for weight in made.graph.initializer:
        values = numpy_helper.to_array(weight)
        if weight.data_type == TensorProto.FLOAT and values.size >= SMALL:
            name = weight.name
            weight.CopyFrom(numpy_helper.from_array(values.astype("float16"), f"{name}_fp16"))
            casts.append(helper.make_node("Cast", [f"{name}_fp16"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *made.graph.node]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
