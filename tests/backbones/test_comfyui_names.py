"""Names in an exported LoRA against the rules by which ComfyUI finds the weight that a LoRA belongs to.

The rules were read in ComfyUI's comfy/lora.py and comfy/utils.py (commits 17358c8 and 09708ea); ComfyUI itself was not
run. A layer is found by a name of it; a file then has its factors as NAME.lora_A.weight and NAME.lora_B.weight.
"""

import re

import pytest
import torch
from safetensors import safe_open
from test_pairs import BACKBONES

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
U_NET = (  # the same for Stable Diffusion; of attention it knows the older names processor.to_q .. processor.to_out
    r"unet\.(conv_in|conv_out|(down_blocks\.\d+|up_blocks\.\d+|mid_block)\."
    r"(resnets\.\d+\.(conv1|conv2|conv_shortcut)|(down|up)samplers\.0\.conv|attentions\.\d+\.(proj_in|proj_out|"
    r"transformer_blocks\.\d+\.(ff\.net\.(0\.proj|2)|attn[12]\.processor\.(to_q|to_k|to_v|to_out)))))"
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


def test_of_stable_diffusion_it_would_leave_out_the_attention(tmp_path):
    """It warns of each such name (`lora key not loaded`); the model card sends readers to teasr anyway."""
    names, _ = exported("sd_unet", "single", tmp_path)
    lost = {name for name in names if not re.fullmatch(U_NET, name)}
    assert lost == {name for name in names if ".attn" in name} and lost < names
    older = {re.sub(r"\.to_out\.0$", ".to_out", name).replace(".to_", ".processor.to_") for name in lost}
    assert all(re.fullmatch(U_NET, name) for name in older)
