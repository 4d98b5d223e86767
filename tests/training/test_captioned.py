"""Training with a caption for each sample: exactly what the samples would do alone, each with its own fixed prompt."""

import pytest
import torch
from conftest import make_shards, partitioning, small_recipe
from safetensors.torch import load_file
from test_captions import SMALL, alike, embed, told  # noqa: F401 - the photographs with captions, as a fixture
from test_pairs import BACKBONES
from test_training import close, rows, start

from teasr import run_config
from teasr.backbones.model import Condition, Model
from teasr.data.batch import Batch
from teasr.data.prep.captions import CaptionsConfig, cache_captions
from teasr.methods.base import Progress
from teasr.training.networks import Networks
from teasr.training.trainer import Trainer
from teasr.training.update import backpropagate

TEASR = {"name": "teasr", "lambda_lpips": 0.0, "ramps": {"rectify": {"start": 0, "length": 0}}}
OSEDIFF = {"name": "score_distillation", "lambda_lpips": 0.0, "cfg_real": 7.5}
D3SR = {"name": "d3sr", "disc_blocks": 1, "lambda_ea_dists": 0.0, "adv_ramp": {"start": 0, "length": 0}}
BLOCKS = {"order": "blocks", "lambda_restart": 1.0}
LENGTHS = {"qwen_image": (3, 7), "z_image": (5, 35), "sd3": (9, 9), "sd_unet": (7, 7)}  # T of two captions
LONG = {"transformer": BACKBONES["z_image"]["transformer"] | {"axes_lens": [128, 32, 32]}}  # places for both
CASES = {  # method and changes of the backbone
    "qwen_image-teasr": (TEASR, {}),
    "qwen_image-blocks": (TEASR | BLOCKS, {"swap_blocks": 1, "host_checkpoints": True}),
    "qwen_image-split": (TEASR | {"mode": "split", "split": [0.5, 0.0, 0.5, 0.0], "lambda_cons": 0.0}, {}),
    "qwen_image-osediff": (OSEDIFF, {}),
    "z_image-teasr": (TEASR, LONG),
    "z_image-osediff": (OSEDIFF | {"student": "single"}, LONG),
    "sd3-teasr": (TEASR, {}),
    "sd3-d3sr": (D3SR, {}),
    "sd_unet-osediff": (OSEDIFF | {"student": "single", "encoder": True}, {}),
}


def built(backbone: str, method: dict, changes: dict):
    """A method and its networks with effective LoRA sets."""
    config = run_config.parse(
        {
            "run_dir": "unused",
            "backbone": {"name": backbone} | BACKBONES[backbone] | changes,
            "method": method,
            "data": {"shards": "unused"},
            "train": {"updates": 2, "batch": 2, "micro_batch": 2, "learning_rate": 1e-3},
        }
    )
    made = config.build_method()
    networks = Networks(config, made)
    for base in networks.bases.values():
        base.to(torch.device("cpu"))
        for name, p in base.net.named_parameters():
            if "lora_B" in name:
                p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return made, networks


def captions_of(backbone: str, networks: Networks) -> tuple[torch.Tensor, ...]:
    width, g = networks.student.network.prompt.shape[-1], torch.Generator().manual_seed(1)
    return tuple(torch.randn(1, n, width, generator=g) for n in LENGTHS[backbone])


def gradients(method, networks, batch, rank=0, ranks=1) -> dict[str, torch.Tensor]:
    """The gradients of all roles after one update on a batch, and the logged values."""
    backpropagate(method, networks.models, [batch], 0, Progress(1, 2), lambda _, value: value.backward(), (rank, ranks))
    found = {}
    for role in networks.trained_roles:
        for name, p in networks.base(role.name).trained(role.name).items():
            found[f"{role.name} {name}"], p.grad = p.grad, None
    return found


@pytest.mark.parametrize("case", [case for case in CASES if "split" not in case])
def test_a_batch_is_its_samples_each_with_its_own_prompt(case):
    """The gradient of an update on two captioned samples is the mean of those of two runs with one prompt each."""
    backbone = case.split("-")[0]
    method, networks = built(backbone, *CASES[case])
    captions, g = captions_of(backbone, networks), torch.Generator().manual_seed(0)
    x_hq, x_lq = (torch.rand(2, 3, 64, 64, generator=g) * 2 - 1 for _ in range(2))
    text = captions if len(set(LENGTHS[backbone])) > 1 else torch.cat(captions)
    found = gradients(method, networks, Batch(x_hq, x_lq, ["a", "b"], text=text))
    plain = gradients(method, networks, Batch(x_hq, x_lq, ["a", "b"]))
    alone = []
    for i, caption in enumerate(captions):
        for base in networks.bases.values():
            base.network.prompt = caption  # what `backbone.prompt` sets
        rows = slice(i, i + 1)
        alone.append(gradients(method, networks, Batch(x_hq[rows], x_lq[rows], ["a"]), i, 2))
    for name, gradient in found.items():
        wanted = (alone[0][name] + alone[1][name]) / 2
        assert (gradient - wanted).abs().max() < 1e-4 * wanted.abs().max() + 1e-9, name
    largest = max(found, key=lambda name: found[name].abs().max())
    assert (found[largest] - plain[largest]).abs().max() > 1e-3 * plain[largest].abs().max()


def test_parts_of_a_batch_take_their_captions_along():
    """In mode `split` the first picture serves one loss and the second another, each with its own caption."""
    method, networks = built("qwen_image", *CASES["qwen_image-split"])
    captions, g = captions_of("qwen_image", networks), torch.Generator().manual_seed(0)
    x_hq, x_lq = (torch.rand(2, 3, 64, 64, generator=g) * 2 - 1 for _ in range(2))
    asked = []
    call = networks.student.call

    def noted(role, part, *inputs):
        asked.append(inputs[-1])
        return call(role, part, *inputs)

    networks.student.call = noted
    gradients(method, networks, Batch(x_hq, x_lq, ["a", "b"], text=captions))
    of = [next(i for i, caption in enumerate(captions) if caption is text) for text in asked]
    assert of == sorted(of) and set(of) == {0, 1}


def test_the_student_may_have_the_fixed_prompt_while_the_scores_have_captions():
    """TSD-SR's choice; the null prompt of guidance is the same for all samples."""
    method, networks = built("z_image", OSEDIFF | {"student": "single", "student_text": "prompt"}, LONG)
    captions, asked = captions_of("z_image", networks), []
    call = networks.student.call
    networks.student.call = lambda role, part, *x: asked.append((role.name, x[-1])) or call(role, part, *x)
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    gradients(method, networks, Batch(x, x, ["a", "b"], text=captions))
    null = networks.student.null_text
    assert [text for role, text in asked if role == "student"] == [None]
    real = [text for role, text in asked if role == "real"]
    assert real[0] is captions[0] and real[1] is captions[1] and real[2] is null and len(real) == 3
    assert [text for role, text in asked if role == "fake"] == [*captions, *captions]


def test_a_wrong_number_of_captions_is_noticed():
    _, networks = built("z_image", TEASR, LONG)
    captions = captions_of("z_image", networks)
    z, t = torch.randn(3, networks.student.latent_channels, 8, 8), torch.full((3,), 0.5)
    with pytest.raises(AssertionError, match="2 captions for 3 samples"):
        Model(networks.student).with_text(captions).velocity(z, t, Condition(z, t))


@pytest.fixture(scope="module")
def captioned(told, tmp_path_factory):  # noqa: F811
    """A shard set with captions, and their embeddings of different and of equal length."""
    folder = tmp_path_factory.mktemp("captioned")
    make_shards(told, folder / "set", **SMALL)
    for name, function in (("text", embed), ("alike", alike)):
        wide = CaptionsConfig(str(folder / "set"), "model", str(folder / name))
        cache_captions(wide, lambda text, function=function: function(text).repeat(1, 8))  # 24 wide
    return folder


def job(captioned, tmp_path, run, backbone, text, stage="zero1", updates=5):
    own = {"name": backbone} | BACKBONES[backbone]
    single = {"student": "single"} if backbone == "sd_unet" else {}
    return small_recipe(
        captioned / "set", tmp_path / run, backbone=own, method=OSEDIFF | single,
        data={"shards": str(captioned / "set"), "streams": 2, "captions": str(captioned / text)},
        train__updates=updates, train__deepspeed=str(partitioning(stage, tmp_path)), train__learning_rate=0.01,
        train__save_every_updates=2, train__cpu_threads=1,
    )  # fmt: skip


def test_it_resumes_to_the_same_bits_on_any_number_of_ranks(captioned, tmp_path):
    """Under ZeRO-3 all ranks have to call the network equally often, whatever the lengths of their captions."""
    z_image = {"backbone": "z_image", "text": "text", "stage": "zero3"}
    jobs = [
        job(captioned, tmp_path, run, **z_image, updates=n) for run, n in (("whole", 5), ("parts", 2), ("parts", 5))
    ]
    start([*jobs, job(captioned, tmp_path, "unet", "sd_unet", "alike")], tmp_path, 1)
    start([job(captioned, tmp_path, "ranks", **z_image)], tmp_path, 2)
    whole, parts = (
        load_file(tmp_path / run / "checkpoints/step-00000005/weights.safetensors") for run in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    close(rows(tmp_path / "whole"), rows(tmp_path / "ranks"), relative=1e-3)
    assert len(rows(tmp_path / "unet")) == 5


def test_mistakes_are_said_before_the_run(captioned, shards, tmp_path):
    def refused(message, **changes):
        data = job(captioned, tmp_path, "run", "z_image", "text") | changes
        with pytest.raises(ValueError, match=message):
            Trainer(run_config.parse(data))

    data = {"shards": str(captioned / "set"), "streams": 2, "captions": str(captioned / "text")}
    tiny = {"name": "tiny", "width": 32, "depth": 2, "heads": 2}
    refused("Tiny takes no text; remove data.captions", backbone=tiny, method=TEASR)
    narrow = BACKBONES["z_image"] | {"transformer": BACKBONES["z_image"]["transformer"] | {"cap_feat_dim": 16}}
    refused("has embeddings of width 24, but random needs width 16", backbone={"name": "z_image"} | narrow)
    refused("data.captions names 2 folder", data=data | {"captions": [str(captioned / "text")] * 2})
    refused("was made from other shards", data=data | {"shards": str(shards)})
