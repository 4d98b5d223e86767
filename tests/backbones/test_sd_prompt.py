"""`teasr cache-prompt` for Stable Diffusion against its pipeline's own embedding: the real classes at tiny size."""

import pytest
import torch
from conftest import make_shards
from test_captions import CAPTIONS, SMALL, told  # noqa: F401 - the photographs with captions, as a fixture

from teasr import cli
from teasr.backbones.prompts import load_prompt
from teasr.backbones.text_encoders import PromptConfig, cache_prompt
from teasr.data.captions import TENSOR, caption_key
from teasr.data.shards import read_shard
from teasr.util.tensor_file import unpack


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The text part of a saved pipeline; its tokenizer knows single letters."""
    from diffusers import StableDiffusionPipeline
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [*sorted(ByteLevel.alphabet())]
    words = [*letters, *(x + "</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)
    torch.manual_seed(0)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            bos_token_id=len(words) - 2, eos_token_id=len(words) - 1,
        )
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    StableDiffusionPipeline(
        None, encoder, tokenizer, None, None, None, None, requires_safety_checker=False
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("prompt", ["", "a sharp photo"])
def test_the_stored_prompt_is_what_the_pipeline_computes(model, tmp_path, prompt):
    from diffusers import StableDiffusionPipeline

    parts = dict.fromkeys(("vae", "unet", "scheduler", "safety_checker", "feature_extractor"))
    pipeline = StableDiffusionPipeline.from_pretrained(model, **parts)
    with torch.no_grad():
        wanted = pipeline.encode_prompt(prompt, torch.device("cpu"), 1, False)[0][0]
    cache_prompt(PromptConfig(str(model), str(tmp_path / "p.safetensors"), prompt, device="cpu", dtype="fp32"))
    embeds, mask, story = load_prompt(tmp_path / "p.safetensors")
    assert embeds.shape == (77, 16) and torch.equal(embeds, wanted) and mask is None and story["prompt"] == prompt


def test_the_captions_of_a_set_are_embedded_as_prompts_are(model, told, tmp_path, capsys):  # noqa: F811
    """`teasr cache-captions`, with a suffix: bit for bit what `teasr cache-prompt` computes for the same words."""
    shards = make_shards(told, tmp_path / "set", **SMALL)
    command = ["cache-captions", f"shards={shards}", f"model={model}", "suffix=, sharp", "dtype=fp32", "device=cpu"]
    assert cli.main(command) == 0 and "77 tokens of width 16" in capsys.readouterr().out
    found = {raw["__key__"]: raw for path in (shards / "captions").glob("*.tar") for raw in read_shard(str(path))}
    for caption in CAPTIONS.values():
        cache_prompt(PromptConfig(str(model), str(tmp_path / "p.safetensors"), f"{caption}, sharp", "cpu", "fp32"))
        tensors, _ = unpack(found[caption_key(caption.encode())]["text.safetensors"], caption)
        assert torch.equal(tensors[TENSOR], load_prompt(tmp_path / "p.safetensors")[0])
    assert cli.main([*command, "suffix="]) == 2
    assert "holds a set of other settings (suffix: , sharp -> ): choose another out=" in capsys.readouterr().err
