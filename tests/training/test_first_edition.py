"""Checkpoints and exports of the version before roles (commit a34644a) load, and training continues with its losses."""

import shutil

import numpy as np
import pytest
import skimage.data
from conftest import ROOT
from safetensors.torch import load_file
from test_training import rows, start

from teasr.backbones import lora_file
from teasr.config.strict_yaml import read_yaml
from teasr.restore.upscaler import Upscaler
from teasr.run_config import load

OLD = ROOT / "tests/fixtures/first_edition"
LQ = np.ascontiguousarray(skimage.data.coffee()[100:140, 200:260])


def test_old_checkpoints_go_on_as_they_did(shards, tmp_path):
    """Three updates by the old version and three by ours match six updates trained by the old version."""
    jobs = []
    for kind in ("tiny", "qwen_image"):
        shutil.copytree(OLD / kind / "checkpoints", tmp_path / kind / "checkpoints")
        shutil.copyfile(OLD / kind / "metrics.csv", tmp_path / kind / "metrics.csv")
        data = read_yaml(OLD / kind / "checkpoints/step-00000003/config.yaml")
        data |= {"run_dir": str(tmp_path / kind), "data": data["data"] | {"shards": str(shards)}}
        data["train"] |= {"updates": 6, "deepspeed": str(ROOT / "ds_configs/zero1.json")}
        jobs.append(data)
    start(jobs, tmp_path, 1)
    for kind in ("tiny", "qwen_image"):
        assert not (tmp_path / kind / "error.txt").exists()
        wanted, found = rows(OLD / kind), rows(tmp_path / kind)
        assert len(wanted) == len(found) == 6 and found[:3] == wanted[:3]
        for want, have in zip(wanted, found, strict=True):
            assert want.keys() == have.keys()
            for name, value in want.items():  # bit-identical on the machine that made the stored values
                assert have[name] == pytest.approx(value, rel=5e-3, abs=1e-4), (want["update"], name)
        new = tmp_path / kind / "checkpoints/step-00000006"
        for file in ("weights", "ema", "optimiser", "fixed"):  # the same files with the same tensor names
            before = load_file(OLD / kind / f"checkpoints/step-00000003/{file}.safetensors")
            after = load_file(new / f"{file}.safetensors")
            assert {n: x.shape for n, x in before.items()} == {n: x.shape for n, x in after.items()}


def test_old_models_restore_alike_from_checkpoint_and_export():
    for kind in ("tiny", "qwen_image"):
        checkpoint = OLD / kind / "checkpoints/step-00000003"
        restored = Upscaler.from_pretrained(checkpoint)(LQ, steps=2, fidelity=0.5)
        assert restored.shape == (160, 240, 3) and restored.std() > 5
        if kind == "tiny":  # the export of a LoRA names a base model, which a randomly initialised base is not
            assert np.array_equal(Upscaler.from_pretrained(OLD / kind / "export")(LQ, steps=2, fidelity=0.5), restored)


def test_an_old_lora_file_has_the_weights_of_its_checkpoint():
    weights, metadata = lora_file.read(OLD / "qwen_image/export")
    wanted = load_file(OLD / "qwen_image/checkpoints/step-00000003/ema.safetensors")
    assert {f"transformer.{n}" if not n.startswith("transformer.") else n for n in weights} == set(wanted)
    assert metadata["lora_rank"] == 2 and metadata["updates"] == 3
    assert load(OLD / "qwen_image/checkpoints/step-00000003/config.yaml").method_name == "teasr"
