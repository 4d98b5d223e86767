"""Prompts of Stable Diffusion 3 and Z-Image against their pipelines: the real classes at tiny size, built here."""

import pytest
import torch

from teasr.backbones.prompts import load_prompt
from teasr.backbones.text_encoders import PromptConfig, cache_prompt

WORDS = "a photo, sharp"


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    """A saved pipeline with two CLIP encoders and T5, whose tokenizers know single letters."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5Tokenizer,
    )

    letters = [*"abcdefghijklmnopqrstuvwxyz,.:"]
    clip = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    torch.manual_seed(0)

    def encoder(width):
        config = CLIPTextConfig(
            vocab_size=len(clip), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            projection_dim=width, eos_token_id=len(clip) - 1, bos_token_id=len(clip) - 2, pad_token_id=len(clip) - 1,
        )  # fmt: skip
        return CLIPTextModelWithProjection(config)

    tokenizers = [CLIPTokenizer(vocab={c: i for i, c in enumerate(clip)}, merges=[]) for _ in range(2)]
    for tokenizer in tokenizers:
        tokenizer.model_max_length = 77
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -1.0) for c in ["▁", *letters])]
    t5 = T5Config(vocab_size=len(pieces) + 100, d_model=40, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    pipeline = StableDiffusion3Pipeline(
        transformer=None, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=encoder(16),
        tokenizer=tokenizers[0], text_encoder_2=encoder(20), tokenizer_2=tokenizers[1],
        text_encoder_3=T5EncoderModel(t5), tokenizer_3=T5Tokenizer(vocab=pieces),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sd3")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def z_image(tmp_path_factory):
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

    vocab = {c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, head_dim=12, max_position_embeddings=1024,
    )  # fmt: skip
    pipeline = ZImagePipeline(FlowMatchEulerDiscreteScheduler(), None, Qwen3Model(config), tokenizer, None)
    folder = tmp_path_factory.mktemp("z_image")
    pipeline.save_pretrained(folder)
    return folder


def stored(folder, tmp_path, prompt):
    cache_prompt(PromptConfig(str(folder), str(tmp_path / "p.safetensors"), prompt, "cpu", "fp32"))
    embeds, mask, _ = load_prompt(tmp_path / "p.safetensors")
    assert mask is None
    return embeds


@pytest.mark.parametrize("prompt", ["", WORDS])
def test_sd3_stores_the_pooled_embedding_as_the_first_row(sd3, tmp_path, prompt):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3, transformer=None, vae=None)
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt(prompt, prompt, prompt, do_classifier_free_guidance=False)
    found = stored(sd3, tmp_path, prompt)
    assert found.shape == (1 + 77 + 256, 40) and torch.equal(found[1:], tokens[0])
    assert torch.equal(found[0, :36], pooled[0]) and not found[0, 36:].any()


@pytest.mark.parametrize("prompt", ["", WORDS])
def test_z_image_stores_the_tokens_of_its_chat_template(z_image, tmp_path, prompt):
    from diffusers import ZImagePipeline

    pipeline = ZImagePipeline.from_pretrained(z_image, transformer=None, vae=None)
    with torch.no_grad():
        wanted = pipeline.encode_prompt(prompt, torch.device("cpu"), do_classifier_free_guidance=False)[0][0]
    assert torch.equal(stored(z_image, tmp_path, prompt), wanted)


def test_what_lacks_a_part_or_is_no_model_of_ours_is_refused(sd3, z_image, tmp_path):
    import shutil

    torn = tmp_path / "torn"
    shutil.copytree(sd3, torn)
    shutil.rmtree(torn / "text_encoder_3")
    with pytest.raises(ValueError, match="torn cannot be loaded"):
        stored(torn, tmp_path, "")
    other = tmp_path / "other"
    shutil.copytree(z_image, other)
    index = other / "model_index.json"
    index.write_text(index.read_text().replace("ZImagePipeline", "FluxPipeline"))
    with pytest.raises(ValueError, match="is a FluxPipeline: no backbone uses it; allowed are QwenImagePipeline"):
        stored(other, tmp_path, "")
