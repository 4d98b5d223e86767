"""Names in an exported LoRA against the rules by which ComfyUI finds the weight that a LoRA belongs to.

The rules were read in ComfyUI's comfy/lora.py and comfy/utils.py (commits 17358c8 and 09708ea), the arithmetic in
comfy/weight_adapter/lora.py (commit a125cd8); ComfyUI itself was not run. A layer is found by a name of it; a file then
has its factors as NAME.lora_A.weight and NAME.lora_B.weight, or NAME.lora_down.weight and NAME.lora_up.weight with
NAME.alpha.
"""

import re

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from test_pairs import BACKBONES
from test_sd_unet import TIMED, built, model, scheduler  # noqa: F401 - model is a fixture

from teasr import run_config
from teasr.backbones import lora_file
from teasr.backbones.roles import Role

ATTENTION = r"(to_q|to_k|to_v|to_out\.0)"
FOUND = {  # backbone -> the names that ComfyUI has for the layers that can have a LoRA
    # the names of its own network, which are those of diffusers
    "qwen_image": rf"transformer\.(img_in|transformer_blocks\.\d+\."
    rf"(attn\.{ATTENTION}|img_mod\.1|img_mlp\.net\.(0\.proj|2)))",
    # its table of diffusers' names; queries, keys and values are parts of one weight there
    "sd3": rf"transformer\.transformer_blocks\.\d+\.(attn2?\.{ATTENTION}|norm1\.linear|ff\.net\.(0\.proj|2))",
    "z_image": rf"transformer\.(all_x_embedder\.2-1|(layers|noise_refiner)\.\d+\."
    rf"(attention\.{ATTENTION}|feed_forward\.w[123]|adaLN_modulation\.0))",
}
U_NET = (  # its table of diffusers' names for Stable Diffusion, with _ for each dot
    r"lora_unet_(conv_in|conv_out|(down_blocks_\d+|up_blocks_\d+|mid_block)_"
    r"(resnets_\d+_(conv1|conv2|conv_shortcut)|(down|up)samplers_0_conv|attentions_\d+_(proj_in|proj_out|"
    r"transformer_blocks_\d+_(ff_net_(0_proj|2)|attn[12]_(to_q|to_k|to_v|to_out_0)))))"
)


def exported(backbone: str, branches: str, folder) -> tuple[set[str], dict[str, tuple[int, ...]]]:
    """Names of the layers in an exported file, without parts of teasr's own, and the shapes of its tensors."""
    config = run_config.parse(
        {
            "run_dir": "unused",
            "backbone": {"name": backbone} | BACKBONES[backbone],
            "method": {"name": "score_distillation", "student": "single"},
            "data": {"shards": "unused"},
            "train": {"updates": 1, "batch": 1, "micro_batch": 1, "learning_rate": 1e-3},
        }
    )
    built = config.build_backbone((Role("student", branches=branches),))
    built.to(torch.device("cpu"))
    peft, ours = built.lora_metadata()
    lora_file.write(
        folder, built.exported(), peft, ours | dict.fromkeys(("weights", "updates", "commit", "recipe"), "")
    )
    with safe_open(folder / lora_file.NAME, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    ends = re.compile(r"\.lora_[AB]\.weight$")
    assert all(ends.search(name) for name in shapes)
    names = {ends.sub("", name) for name in shapes}
    assert all({f"{name}.lora_A.weight", f"{name}.lora_B.weight"} <= shapes.keys() for name in names)
    return names, shapes


@pytest.mark.parametrize("branches", ["dual", "single"])
@pytest.mark.parametrize("backbone", FOUND)
def test_every_layer_of_a_transformer_has_a_name_that_comfyui_knows(backbone, branches, tmp_path):
    names, shapes = exported(backbone, branches, tmp_path)
    assert len(names) > 10 and all(re.fullmatch(FOUND[backbone], name) for name in names)
    for name in names:  # it multiplies the factors and expects the shape of the weight
        down, up = shapes[f"{name}.lora_A.weight"], shapes[f"{name}.lora_B.weight"]
        assert len(down) == len(up) == 2 and down[0] == up[1]


@pytest.fixture
def written(model, tmp_path):  # noqa: F811
    """A student of TADSR, whose LoRA has an effect and the scale 2, and the folder of its file."""
    student = built(model, (TIMED,))
    peft, ours = student.lora_metadata()
    ours |= dict.fromkeys(("weights", "updates", "commit", "recipe"), "")
    lora_file.write(tmp_path, student.exported(), peft, ours)
    return student, tmp_path


def outputs(student, stock) -> tuple[torch.Tensor, torch.Tensor]:
    """What our U-Net and a stock one return for the same latents."""
    x, index = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500, 20])
    text = student.net.prompt.expand(2, -1, -1)
    with torch.no_grad():
        return student.net.view_of(TIMED)(x, index, text).sample, stock(x, index, text).sample


def test_by_comfyuis_rule_the_file_in_kohyas_layout_gives_our_u_net(written, model):  # noqa: F811
    """weight += alpha / rank * up @ down, each flattened to a matrix, in the shape of the weight."""
    student, folder = written
    loaded = load_file(folder / lora_file.KOHYA)
    stock = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    layers = {f"lora_unet_{name.replace('.', '_')}": layer for name, layer in stock.named_modules()}
    adapted = {key.partition(".")[0] for key in loaded}
    assert all(re.fullmatch(U_NET, name) for name in adapted) and any("attn2_to_out_0" in name for name in adapted)
    lora = [name for name in student.exported() if name.startswith("unet.")]
    assert 2 * len(adapted) == len(lora) and len(loaded) == 3 * len(adapted)
    for name in adapted:
        up, down, weight = loaded[f"{name}.lora_up.weight"], loaded[f"{name}.lora_down.weight"], layers[name].weight
        scale = loaded[f"{name}.alpha"].item() / len(down)
        assert scale == 2
        weight.data += scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    ours, theirs = outputs(student, stock)
    assert torch.allclose(ours, theirs, atol=1e-4 * ours.abs().max().item())


def test_diffusers_pipeline_loads_the_file_in_kohyas_layout_completely(written, model):  # noqa: F811
    student, folder = written
    stock = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    before = outputs(student, stock)[1]
    others = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae")
    pipeline = StableDiffusionPipeline(
        vae=vae, unet=stock, scheduler=scheduler(), requires_safety_checker=False, **others
    )
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):  # of the modulation by time
        pipeline.load_lora_weights(folder, weight_name=lora_file.NAME)
    pipeline.load_lora_weights(folder, weight_name=lora_file.KOHYA)
    ours, theirs = outputs(student, stock)
    assert torch.allclose(ours, theirs, atol=1e-4 * ours.abs().max().item())
    assert not torch.allclose(ours, before, atol=1e-2 * ours.abs().max().item())
    assert sum(".lora_A." in name for name, _ in stock.named_parameters()) * 3 == len(
        load_file(folder / lora_file.KOHYA)
    )


def test_what_only_teasr_uses_stays_in_its_own_file_and_the_card_says_so(written):
    student, folder = written
    weights, _ = lora_file.read(folder)
    assert weights.keys() == student.exported().keys()
    left = {name for name in weights if not name.startswith("unet.")}
    kinds = ("lora", "film", "embed")
    assert all(name.startswith(tuple(f"parts.student.encoder.{kind}." for kind in kinds)) for name in left)
    count = sum(weights[name].numel() for name in left)
    card = (folder / "README.md").read_text()
    assert f'weight_name="{lora_file.KOHYA}"' in card and f"the other {count / 1e6:,.2f} M" in card
