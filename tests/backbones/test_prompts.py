"""data_prep/cache_prompt.py against QwenImagePipeline.encode_prompt: the real classes at tiny size, built here."""

import importlib.util
import json
import os
import shutil

import pytest
import torch
from conftest import ROOT

from teasr.backbones.prompts import load_prompt
from teasr.util.tensor_file import pack, unpack


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved Qwen-Image pipeline of a few thousand parameters; its tokenizer knows single bytes and one merge."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    vocab = {c: i for i, c in enumerate([*sorted(ByteLevel.alphabet()), "in"])}
    ends = ["<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[("i", "n")], additional_special_tokens=ends)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
    torch.manual_seed(0)
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    folder = tmp_path_factory.mktemp("model")
    pipeline = QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), None, encoder, tokenizer, None)
    pipeline.save_pretrained(folder)
    return folder


def run(*settings):
    """Run the program in this process and return its exit code."""
    spec = importlib.util.spec_from_file_location("cache_prompt", ROOT / "data_prep/cache_prompt.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(list(settings))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("prompt", ["", "a cat: in the rain, {braces} = 1"])
def test_the_stored_prompt_is_what_the_pipeline_computes(model, tmp_path, prompt, dtype):
    from diffusers import QwenImagePipeline

    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    pipeline = QwenImagePipeline.from_pretrained(model, transformer=None, vae=None, dtype=kind)
    with torch.no_grad():
        wanted, wanted_mask = pipeline.encode_prompt(prompt, device=torch.device("cpu"))
    assert run(f"model={model}", f"out={tmp_path}/p.safetensors", f"prompt={prompt}", f"dtype={dtype}") == 0
    embeds, mask, story = load_prompt(tmp_path / "p.safetensors")
    assert embeds.dtype == kind and embeds.shape[1] == 32 and torch.equal(embeds, wanted[0])
    assert mask is None and wanted_mask is None
    assert story["prompt"] == prompt and story["model"] == str(model)
    assert set(story["libraries"]) == {"diffusers", "torch", "transformers"}


def test_the_same_command_keeps_the_file_and_another_replaces_it(model, tmp_path, capsys):
    path = tmp_path / "new/prompt.safetensors"
    assert run(f"model={model}", f"out={path}") == 0
    assert "prompt '' of" in capsys.readouterr().out
    made, data = path.stat().st_mtime_ns, path.read_bytes()
    assert run(f"model={model}", f"out={path}", "prompt=") == 0
    assert "already contains prompt '' of" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == made
    path.unlink()
    assert run(f"model={model}", f"out={path}") == 0
    assert path.read_bytes() == data  # the bytes depend only on the prompt, the model and the library versions
    capsys.readouterr()
    assert run(f"model={model}", f"out={path}", "prompt=sharp") == 0
    assert "is computed again: prompt '' -> 'sharp'" in capsys.readouterr().out
    assert load_prompt(path)[2]["prompt"] == "sharp"
    path.write_bytes(data[:-3])
    assert run(f"model={model}", f"out={path}") == 0
    assert "is damaged" in capsys.readouterr().out and path.read_bytes() == data
    assert [p.name for p in path.parent.iterdir()] == ["prompt.safetensors"]


def test_another_file_is_not_overwritten(model, tmp_path, capsys):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    assert run(f"model={model}", f"out={path}") == 2
    assert f"out = {path} exists and is no prompt file" in capsys.readouterr().err and path.read_text() == "mine"


def test_damage_is_seen_wherever_it_is(tmp_path):
    path = tmp_path / "prompt.safetensors"
    tensors = {"prompt_embeds": torch.randn(5, 8).bfloat16(), "prompt_mask": torch.ones(5, dtype=torch.long)}
    data = pack(tensors, {"prompt": "ä"})
    path.write_bytes(data)
    embeds, mask, story = load_prompt(path)
    assert torch.equal(embeds, tensors["prompt_embeds"]) and mask.sum() == 5 and story == {"prompt": "ä"}
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        if b"\\u00E4" in path.read_bytes():
            continue  # the same letter, with its escape written in upper-case digits
        with pytest.raises(ValueError, match=r"prompt .*cache-prompt"):
            load_prompt(path)
    for length in (0, 7, 100, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"prompt .*cache-prompt"):
            load_prompt(path)
    path.write_bytes(pack({"x": torch.zeros(1)}, {}))
    with pytest.raises(ValueError, match="contains no prompt_embeds"):
        load_prompt(path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_prompt(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="x is damaged"):
        unpack(b"", "x")


def test_mistakes_are_one_line_with_the_cure(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("no_tokenizer", "no_encoder", "torn", "lacking"):
        shutil.copytree(model, tmp_path / name)
    shutil.rmtree(tmp_path / "no_tokenizer/tokenizer")
    shutil.rmtree(tmp_path / "no_encoder/text_encoder")
    with open(tmp_path / "torn/text_encoder/model.safetensors", "r+b") as file:
        file.truncate(2000)
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "text_encoder/model.safetensors")
    gone = next(name for name in sorted(weights) if "layers.1.mlp.up_proj" in name)
    del weights[gone]
    save_file(weights, tmp_path / "lacking/text_encoder/model.safetensors", {"format": "pt"})
    out = tmp_path / "out/prompt.safetensors"
    for change, message in (
        ({"model": "/nowhere/qwen"}, "model = /nowhere/qwen is neither a folder nor"),
        ({"model": "nobody/nothing"}, "model = nobody/nothing cannot be loaded"),
        ({"model": tmp_path / "no_tokenizer"}, "its folder tokenizer is missing or broken"),
        (
            {"model": tmp_path / "no_encoder"},
            "give the local folder of a complete diffusers model (model=/path/to/model)",
        ),
        ({"model": tmp_path / "torn"}, "torn cannot be loaded"),
        ({"model": tmp_path / "lacking"}, "its text encoder lacks"),
        ({"out": tmp_path}, "is a folder: name a file"),
        ({"dtype": "fp16"}, "allowed are bf16, fp32"),
        ({"promt": "a"}, "did you mean prompt?"),
    ):
        assert run(*(f"{key}={value}" for key, value in ({"model": model, "out": out} | change).items())) == 2, change
        errors = [line for line in capsys.readouterr().err.splitlines() if line and "it/s" not in line]
        assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0], errors
    assert not out.parent.exists()


def test_a_full_disk_leaves_the_old_file(model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "prompt.safetensors"
    assert run(f"model={model}", f"out={out}") == 0
    data = out.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert run(f"model={model}", f"out={out}", "prompt=b") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert out.read_bytes() == data and [p.name for p in tmp_path.iterdir()] == [out.name]


def test_a_tokenizer_of_other_words_is_refused(model, tmp_path, capsys):
    """transformers silently builds a tokenizer that lacks words; every prompt would be embedded wrongly."""
    other = tmp_path / "model"
    shutil.copytree(model, other)
    path = other / "tokenizer/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"].pop("D")
    path.write_text(json.dumps(tokenizer))
    assert run(f"model={other}", f"out={tmp_path / 'p.safetensors'}") == 2
    assert "the encoded prompt template" in capsys.readouterr().err
