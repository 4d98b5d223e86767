"""data_prep/cache_latents.py with a real VAE at tiny size: values, hash, damage and mistakes.

The hash does not depend on how the work was split or interrupted.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import warm
from conftest import ROOT, make_shards
from test_shards import rewrite

from teasr.data.latents import LatentsConfig, cache_latents, read_latents
from teasr.data.shards import ShardSet, decode, read_shard
from teasr.imaging import images

MEAN, STD = (0.1, -0.2, 0.3, 0.4), (1.0, 2.0, 0.5, 0.7)


def tiny_vae(folder, seed=0):
    """A saved AutoencoderKLQwenImage with 4 channels, in vae/ of a model's folder."""
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(seed)
    AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=list(MEAN), latents_std=list(STD)
    ).save_pretrained(folder / "vae")
    return str(folder)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return tiny_vae(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(shards, vae, tmp_path_factory):
    """The sidecars of `shards`, made without interruption."""
    out = tmp_path_factory.mktemp("latents")
    cache_latents(LatentsConfig(str(shards), vae, str(out), dtype="fp32"))
    return out


def run(*settings):
    """Run the program in this process and return its exit code."""
    spec = importlib.util.spec_from_file_location("cache_latents", ROOT / "data_prep/cache_latents.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(list(settings))


def set_hash(out):
    return json.loads((out / "index.json").read_text())["set_sha256"]


def tars(out):
    return {p.name: p.read_bytes() for p in sorted(out.glob("shard-*.tar"))}


def copied(source, target):
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    return target


def test_values_are_those_of_the_vae_normalised_by_hand(shards, vae, whole):
    from diffusers import AutoencoderKLQwenImage

    model = AutoencoderKLQwenImage.from_pretrained(vae, subfolder="vae").eval()
    mean, std = (torch.tensor(x).view(1, 4, 1, 1, 1) for x in (MEAN, STD))
    stored = read_latents(f"{whole}/shard-000001.tar")
    raw = read_shard(f"{shards}/shard-000001.tar")
    assert list(stored) == [record["__key__"] for record in raw] and len(stored) == 12
    for record in raw[:3]:
        sample = decode(record)
        for name, picture in (("hq", sample.hq), ("lq", images.upsample(sample.lq, 4))):
            x = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
            with torch.no_grad():
                wanted = (model.encode(x).latent_dist.mode() - mean) / std
            z = stored[record["__key__"]][name]
            assert z.shape == (4, 8, 8) and z.dtype == torch.float32
            torch.testing.assert_close(z, wanted[0, :, 0], rtol=1e-4, atol=1e-5)


def test_the_sidecars_are_a_shard_set_with_the_keys_of_the_images(shards, whole):
    images_set, latents = ShardSet.open(str(shards)), ShardSet.open(str(whole))
    assert latents.counts == images_set.counts and len(latents) == 48
    settings = json.loads((whole / "index.json").read_text())["settings"]
    assert settings["vae_config"]["latents_std"] == list(STD) and settings["dtype"] == "fp32"


def test_stored_in_bf16_beside_the_images_by_default(photos, vae, tmp_path, capsys):
    shards = make_shards(photos, tmp_path / "set", crops_per_photo=2, shard_samples=6)
    cache_latents(LatentsConfig(str(shards), vae))
    said = capsys.readouterr().out
    assert "latents   6/6 samples" in said and "left" in said
    assert f"6 samples in 1 shards, 0.0 MB, sha256 {set_hash(shards / 'latents')[:12]}" in said
    assert {z.dtype for z in read_latents(f"{shards}/latents/shard-000000.tar")["000000000"].values()} == {
        torch.bfloat16
    }
    make_shards(photos, shards, crops_per_photo=2, shard_samples=6)  # preparing the set again does not touch them
    assert len(read_latents(f"{shards}/latents/shard-000000.tar")) == 6


def test_every_variant_has_its_latent(photos, vae, tmp_path):
    shards = make_shards(photos, tmp_path / "set", crops_per_photo=1, variants=3)
    cache_latents(LatentsConfig(str(shards), vae, dtype="fp32", batch=5))  # batches that end inside a sample
    stored = read_latents(f"{shards}/latents/shard-000000.tar")
    encoder_of_one = tmp_path / "one"
    cache_latents(LatentsConfig(str(shards), vae, str(encoder_of_one), dtype="fp32", batch=1))
    for key, tensors in read_latents(f"{encoder_of_one}/shard-000000.tar").items():
        assert list(stored[key]) == ["hq", "lq", "lq.1", "lq.2"]
        for name, z in tensors.items():
            torch.testing.assert_close(stored[key][name], z, rtol=1e-4, atol=1e-5)
        assert not torch.equal(tensors["lq.1"], tensors["lq.2"])


def test_resumed_after_lost_manifests_and_torn_tars_it_has_the_same_bytes(shards, vae, whole, tmp_path, capsys):
    out = copied(whole, tmp_path / "out")
    (out / "index.json").unlink()
    (out / "shard-000000.json").unlink()
    (out / "shard-000001.tar").write_bytes((out / "shard-000001.tar").read_bytes()[:5000])
    (out / "shard-000002.json").write_text('{"torn')
    kept = (out / "shard-000003.tar").stat().st_mtime_ns
    cache_latents(LatentsConfig(str(shards), vae, str(out), dtype="fp32"))
    assert tars(out) == tars(whole) and set_hash(out) == set_hash(whole)
    assert (out / "shard-000003.tar").stat().st_mtime_ns == kept
    capsys.readouterr()
    cache_latents(LatentsConfig(str(shards), vae, str(out), dtype="fp32"))
    assert "samples/s" not in capsys.readouterr().out  # nothing was left to do


def test_two_parts_make_what_one_makes(shards, vae, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        assert run(f"shards={shards}", f"vae={vae}", f"out={tmp_path}", "dtype=fp32") == 0
        if rank == 1:
            assert "part 1 of 2 is done; 2 shards of other parts are still missing" in capsys.readouterr().out
            assert sorted(tars(tmp_path)) == ["shard-000001.tar", "shard-000003.tar"]
    assert tars(tmp_path) == tars(whole) and set_hash(tmp_path) == set_hash(whole)


def test_other_weights_or_settings_make_the_sidecars_again(shards, vae, whole, tmp_path):
    out = copied(whole, tmp_path / "out")
    cache_latents(LatentsConfig(str(shards), tiny_vae(tmp_path / "other", seed=1), str(out), dtype="fp32"))
    assert all(a != b for a, b in zip(tars(out).values(), tars(whole).values(), strict=True))
    cache_latents(LatentsConfig(str(shards), vae, str(out)))
    assert read_latents(f"{out}/shard-000000.tar")["000000000"]["hq"].dtype == torch.bfloat16
    cache_latents(LatentsConfig(str(shards), vae, str(out), dtype="fp32"))
    assert set_hash(out) == set_hash(whole)


def test_killed_it_goes_on(shards, vae, whole, tmp_path):
    """kill -9 once the first sidecar exists, while a later one is being written; then the same command again."""
    command = [sys.executable, "data_prep/cache_latents.py", f"shards={shards}", f"vae={vae}", f"out={tmp_path}"]
    command += ["dtype=fp32", "device=cpu"]
    job = warm.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
    while not (tmp_path / "shard-000000.tar").exists() and job.poll() is None:
        time.sleep(0.002)
    os.killpg(job.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL and not (tmp_path / "index.json").exists()
    warm.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert tars(tmp_path) == tars(whole) and set_hash(tmp_path) == set_hash(whole)
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_broken_sample_is_named_and_finished_sidecars_stay(shards, vae, whole, tmp_path, capsys):
    broken, out = copied(shards, tmp_path / "set"), tmp_path / "out"
    rewrite(broken / "shard-000002.tar", lambda name, data: data[:200] if name == "000000027.lq.png" else data)
    arguments = [f"shards={broken}", f"vae={vae}", f"out={out}", "dtype=fp32"]
    assert run(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    assert "shard-000002.tar/000000027.lq.png" in error and "data_prep/verify_shards.py" in error
    assert sorted(tars(out)) == ["shard-000000.tar", "shard-000001.tar"] and not (out / "index.json").exists()
    (broken / "shard-000002.tar").write_bytes((shards / "shard-000002.tar").read_bytes())
    assert run(*arguments) == 0
    assert set_hash(out) == set_hash(whole)


@pytest.mark.parametrize("end", [10_240, None])
def test_a_shard_that_ends_early_or_is_another_one_is_an_error(shards, vae, tmp_path, end):
    """A tar that was cut between two members, or replaced, can be read without an error; only its hash reveals it."""
    broken = copied(shards, tmp_path / "set")
    path = broken / "shard-000000.tar"
    if end:
        rewrite(path, lambda name, data: data if name < "000000011" else None)
    else:
        path.write_bytes((shards / "shard-000001.tar").read_bytes())
    with pytest.raises(ValueError, match=r"shard-000000\.tar is not the shard that index\.json lists"):
        cache_latents(LatentsConfig(str(broken), vae, str(tmp_path / "out")))
    assert not list((tmp_path / "out").iterdir())


def test_damage_to_a_sidecar_is_seen(whole, tmp_path):
    data = (whole / "shard-000000.tar").read_bytes()
    path = tmp_path / "shard-000000.tar"
    sound = read_latents(f"{whole}/shard-000000.tar")
    step = len(data) // 150
    for place in range(0, len(data), step):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        try:
            read = read_latents(str(path))
        except ValueError as error:
            assert "data_prep/cache_latents.py again" in str(error)
        else:  # the padding of the tar was hit, and no number has changed
            assert all(torch.equal(z, sound[k][n]) for k, row in read.items() for n, z in row.items())
            assert read.keys() == sound.keys()
    for length in (0, 100, 512, 5000, len(data) // 2 // 512 * 512):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="cache_latents"):
            read_latents(str(path))
    path.write_bytes(data)
    rewrite(path, lambda name, data: data if name < "000000011" else None)
    with pytest.raises(ValueError, match=r"holds 11 samples, but its metadata says \{12\}"):
        read_latents(str(path))
    with pytest.raises(ValueError, match="cannot be read"):
        read_latents(str(tmp_path / "nowhere.tar"))


def test_a_full_disk_leaves_nothing_half_written(shards, vae, tmp_path, monkeypatch, capsys):
    arguments = [f"shards={shards}", f"vae={vae}", f"out={tmp_path / 'out'}"]
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert run(*arguments) == 2
    assert "No space left on device; what is finished is kept" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def saved(folder, change):
    """A VAE folder whose weights are {name: tensor} after `change`."""
    from safetensors.torch import load_file, save_file

    tiny_vae(folder)
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    return folder


def test_mistakes_are_one_line_with_the_cure(shards, vae, tmp_path, monkeypatch, capsys, photos):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    torn = tmp_path / "torn"
    tiny_vae(torn)
    with open(torn / "vae/diffusion_pytorch_model.safetensors", "r+b") as file:
        file.truncate(1000)
    without = tmp_path / "without"
    tiny_vae(without)
    (without / "vae/diffusion_pytorch_model.safetensors").unlink()
    lacking = saved(tmp_path / "lacking", lambda weights: weights.pop("quant_conv.weight"))
    infinite = saved(tmp_path / "inf", lambda weights: weights["quant_conv.weight"].fill_(float("nan")))
    odd = make_shards(photos, tmp_path / "odd", crop_px=60, crops_per_photo=1)
    good = {"shards": str(shards), "vae": vae, "out": str(tmp_path / "out")}
    for change, message in (
        ({"vae": "/nowhere/qwen"}, "vae = /nowhere/qwen is neither a folder nor"),
        ({"vae": "nobody/nothing"}, "vae = nobody/nothing cannot be loaded"),
        ({"vae": tmp_path / "empty"}, "give the local folder of a complete diffusers model (vae=/path/to/model)"),
        ({"vae": torn}, "torn cannot be loaded (Unable to load weights"),
        ({"vae": without}, "without cannot be loaded (Error no file named diffusion_pytorch_model.safetensors"),
        ({"vae": lacking}, "its weights lack the tensor quant_conv.weight"),
        ({"vae": infinite}, "not finite"),
        ({"shards": "/nowhere"}, "/nowhere holds no index.json: make shards"),
        ({"shards": odd}, "HQ of 60x60 px: the VAE takes multiples of 8 px"),
        ({"out": shards}, "holds the index.json of a set without latents"),
        ({"batch": 0}, "batch = 0: must be >= 1"),
        ({"dtype": "fp16"}, "allowed are bf16, fp32"),
        ({"devices": "cpu"}, "did you mean device?"),
    ):
        assert run(*(f"{key}={value}" for key, value in (good | change).items())) == 2, change
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and "\n" not in error and message in error, error
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_an_error(shards, vae, tmp_path, capsys):
    assert run(f"shards={shards}", f"vae={vae}", f"out={tmp_path}", "device=cuda") == 2
    assert "device = cuda, LOCAL_RANK = 0, but PyTorch finds 0 GPU(s): set device=cpu" in capsys.readouterr().err
