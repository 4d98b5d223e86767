"""data_prep/cache_latents.py with a real VAE at tiny size: values, hash, damage and mistakes.

The hash does not depend on how the work was split or interrupted. Training reads what was cached.
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

from teasr.backbones.qwen_image.vae import QwenCodec
from teasr.data import latents
from teasr.data.config import DataConfig
from teasr.data.latents import LatentCache
from teasr.data.prep.folder import claimed
from teasr.data.prep.latents import DTYPES, LatentsConfig, cache_latents
from teasr.data.shards import ShardSet, decode, read_shard
from teasr.data.stream import PairStream, batches
from teasr.imaging import images
from teasr.util.tensor_file import unpack

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


def cache(*settings, overwrite=False, **more):
    """Cache latents as data_prep/cache_latents.py does."""
    config = LatentsConfig(*settings, **more)
    codec = QwenCodec.from_pretrained(config.vae, DTYPES[config.compute_dtype], key="vae")
    cache_latents(config, codec, torch.device("cpu"), overwrite=overwrite)


def read_latents(path):
    """{key: {name: latent}} of one sidecar."""
    return {raw["__key__"]: unpack(raw[latents.MEMBER], str(path))[0] for raw in read_shard(str(path))}


@pytest.fixture(scope="module")
def whole(shards, vae, tmp_path_factory):
    """The sidecars of `shards`, made without interruption."""
    out = tmp_path_factory.mktemp("latents")
    cache(str(shards), vae, str(out), dtype="fp32")
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
        if path.is_file() and path.suffix in (".tar", ".json"):
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
    images_set, cached = ShardSet.open(str(shards)), ShardSet.open(str(whole))
    assert cached.counts == images_set.counts and len(cached) == 48
    settings = json.loads((whole / "index.json").read_text())["settings"]
    assert settings["augment"] == "flip" and settings["dtype"] == "fp32"


def test_stored_in_bf16_beside_the_images_by_default(photos, vae, tmp_path, capsys):
    shards = make_shards(photos, tmp_path / "set", crops_per_photo=2, shard_samples=6)
    cache(str(shards), vae)
    said = capsys.readouterr().out
    assert "latents   6/6 samples" in said
    assert f"6 samples in 1 shards, 0.0 MB, sha256 {set_hash(shards / 'latents')[:12]}" in said
    assert {z.dtype for z in read_latents(f"{shards}/latents/shard-000000.tar")["000000000"].values()} == {
        torch.bfloat16
    }
    make_shards(photos, shards, crops_per_photo=2, shard_samples=6)  # preparing the set again does not touch them
    assert len(read_latents(f"{shards}/latents/shard-000000.tar")) == 6


def test_every_variant_has_its_latent(photos, vae, tmp_path):
    shards = make_shards(photos, tmp_path / "set", crops_per_photo=1, variants=3)
    cache(str(shards), vae, dtype="fp32", batch=5)  # batches that end inside a sample
    stored = read_latents(f"{shards}/latents/shard-000000.tar")
    encoder_of_one = tmp_path / "one"
    cache(str(shards), vae, str(encoder_of_one), dtype="fp32", batch=1)
    for key, tensors in read_latents(f"{encoder_of_one}/shard-000000.tar").items():
        assert sorted(stored[key]) == sorted(f"{n}{t}" for n in ("hq", "lq", "lq.1", "lq.2") for t in ("", "@1"))
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
    cache(str(shards), vae, str(out), dtype="fp32")
    assert tars(out) == tars(whole) and set_hash(out) == set_hash(whole)
    assert (out / "shard-000003.tar").stat().st_mtime_ns == kept
    capsys.readouterr()
    cache(str(shards), vae, str(out), dtype="fp32")
    assert "samples/s" not in capsys.readouterr().out  # nothing was left to do


def test_two_parts_make_what_one_makes(shards, vae, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        assert run(f"shards={shards}", f"vae={vae}", f"out={tmp_path}", "dtype=fp32") == 0
        if rank == 1:
            assert "part 1 of 2 is finished; 2 shards of other parts are still missing" in capsys.readouterr().out
            assert sorted(tars(tmp_path)) == ["shard-000001.tar", "shard-000003.tar"]
    assert tars(tmp_path) == tars(whole) and set_hash(tmp_path) == set_hash(whole)


def test_other_weights_settings_or_shards_replace_the_latents_only_when_asked_to(
    photos, shards, vae, whole, tmp_path, capsys
):
    out, other = copied(whole, tmp_path / "out"), tiny_vae(tmp_path / "other", seed=1)
    more = make_shards(photos, tmp_path / "more", crops_per_photo=2)
    for source, weights, dtype, named in (
        (shards, other, "fp32", "(codec_sha256: "),
        (shards, vae, "bf16", "(dtype: fp32 -> bf16)"),
        (more, vae, "fp32", "(shards_sha256: "),
    ):
        arguments = [f"shards={source}", f"vae={weights}", f"out={out}", f"dtype={dtype}"]
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert f"{out} holds a set of other settings {named}" in error and "or add --overwrite" in error
        assert tars(out) == tars(whole) and set_hash(out) == set_hash(whole)
        assert run(*arguments, "--overwrite") == 0
        assert set_hash(out) != set_hash(whole)
        assert run(f"shards={shards}", f"vae={vae}", f"out={out}", "dtype=fp32", "--overwrite") == 0
        assert set_hash(out) == set_hash(whole)


def test_a_folder_of_other_files_is_left_alone(shards, vae, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert run(f"shards={shards}", f"vae={vae}", f"out={tmp_path}") == 2
    assert "is not empty (notes.txt), and no set was begun in it: choose another out=" in capsys.readouterr().err


def test_a_second_job_on_the_same_part_is_refused(shards, vae, whole, tmp_path, capsys):
    out = copied(whole, tmp_path / "out")
    settings = json.loads((out / "index.json").read_text())["settings"]
    with claimed(out, settings, "caching latents", 0, 1, False):
        assert run(f"shards={shards}", f"vae={vae}", f"out={out}", "dtype=fp32") == 2
    assert f"in use by pid {os.getpid()}" in capsys.readouterr().err


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
    assert "shard-000002.tar/000000027.lq.png" in error and "`teasr verify`" in error
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
        cache(str(broken), vae, str(tmp_path / "out"))
    assert not tars(tmp_path / "out") and not list((tmp_path / "out").glob("*.tmp"))


def stream(shards, cached, first=0, **settings):
    """A training stream that reads cached latents."""
    config = DataConfig(str(shards), latents=str(cached), **settings)
    return PairStream(ShardSet.open(str(shards)), config, 0, 0, 1, first)


@pytest.mark.parametrize("augment", ["none", "flip", "dihedral"])
def test_training_reads_the_latents_of_the_images_that_it_sees(shards, vae, tmp_path, augment):
    """Also in loader processes, for variants, and when a run is resumed in the middle."""
    cache(str(shards), vae, str(tmp_path), dtype="fp32", augment=augment)
    codec = QwenCodec.from_pretrained(vae, torch.float32)
    read = batches(stream(shards, tmp_path, augment=augment, workers=2), 12)
    seen = [next(read)[0] for _ in range(4)]
    for batch in seen:
        for x, z in ((batch.x_hq, batch.z_hq), (batch.x_lq, batch.z_lq)):
            with torch.no_grad():
                torch.testing.assert_close(z, codec.encode(x), rtol=1e-4, atol=1e-5)
    resumed, _ = next(batches(stream(shards, tmp_path, augment=augment, first=24), 12))
    assert torch.equal(resumed.z_lq, seen[2].z_lq) and resumed.keys == seen[2].keys
    plain = PairStream(ShardSet.open(str(shards)), DataConfig(str(shards), augment=augment), 0, 0, 1, 0)
    without, _ = next(batches(plain, 12))
    assert without.z_hq is None and torch.equal(without.x_lq, seen[0].x_lq)  # the images are the same with and without


def test_several_sets_and_variants_are_read_with_their_latents(photos, vae, tmp_path):
    sets = [make_shards(photos, tmp_path / f"set{i}", crops_per_photo=6, variants=2, seed=i) for i in (1, 2)]
    for folder in sets:
        cache(str(folder), vae, dtype="fp32", augment="none")
    codec, names = QwenCodec.from_pretrained(vae, torch.float32), tuple(map(str, sets))
    config = DataConfig(names, streams=2, augment="none", latents=tuple(f"{name}/latents" for name in names))
    shards = ShardSet.open(*names)
    read = batches(PairStream(shards, config, 0, 0, 1, 0), len(shards))
    for batch, _ in (next(read), next(read)):  # the second epoch has the other variant
        with torch.no_grad():
            torch.testing.assert_close(batch.z_lq, codec.encode(batch.x_lq), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"names 1 folder\(s\) and data.shards 2"):
        LatentCache.open((f"{names[0]}/latents",), shards, "none")
    cache(names[1], tiny_vae(tmp_path / "other", seed=1), dtype="fp32", augment="none", overwrite=True)
    with pytest.raises(ValueError, match="come from different VAEs"):
        LatentCache.open(config.latents, shards, "none")


def test_latents_that_do_not_fit_are_an_error_with_the_cure(shards, photos, vae, whole, tmp_path):
    shard_set = ShardSet.open(str(shards))
    other = make_shards(photos, tmp_path / "other", seed=7)
    for location, source, augment, message in (
        (tmp_path / "nowhere", shards, "flip", r"holds no index.json: make it with `teasr cache-latents shards="),
        (shards, shards, "flip", "does not hold cached latents"),
        (whole, other, "flip", r"was made from other shards than those in .*other \(shard-000000.tar differs\)"),
        (whole, shards, "dihedral", "data.augment = dihedral, but the latents in .* were made with augment=flip"),
    ):
        with pytest.raises(ValueError, match=message):
            LatentCache.open((str(location),), ShardSet.open(str(source)), augment)
    LatentCache.open((str(whole),), shard_set, "none")
    with pytest.raises(ValueError, match=r"data.degrade = online makes new LQ images"):
        DataConfig(str(shards), latents=str(whole), degrade="online")
    cached = LatentCache.open((str(whole),), shard_set, "flip")
    cached.check_codec(QwenCodec.from_pretrained(vae, torch.bfloat16).sha256())  # the dtype does not matter
    with pytest.raises(ValueError, match=f"come from the VAE {vae}, not from this run's"):
        cached.check_codec(QwenCodec.from_pretrained(tiny_vae(tmp_path / "vae", seed=1), torch.float32).sha256())


def test_damage_to_a_sidecar_is_seen_and_the_sample_replaced(shards, whole, tmp_path):
    """Every read either gives the cached latents or names the broken sample, whichever bit was flipped."""
    sound = {key: row["hq"] for path in whole.glob("*.tar") for key, row in read_latents(path).items()}
    out = copied(whole, tmp_path / "out")
    data, path, named = (whole / "shard-000000.tar").read_bytes(), out / "shard-000000.tar", 0
    for place in range(0, len(data), len(data) // 40):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        read = iter(stream(shards, out, augment="none"))
        for pair in (next(read) for _ in range(48)):
            assert torch.equal(pair.z_hq, sound[pair.key])
            named += len(pair.bad)
    assert named >= 20
    rewrite(path, lambda name, content: content if name < "000000011" else None)
    read = iter(stream(shards, out, augment="none"))
    bad = [message for _ in range(48) for message in next(read).bad]
    assert len(bad) == 1 and "000000011.latents.safetensors is missing: run `teasr cache-latents` again" in bad[0]
    path.unlink()
    read = iter(stream(shards, out, augment="none"))
    bad = [message for _ in range(48) for message in next(read).bad]
    assert len(bad) >= 12 and "shard-000000.tar cannot be read" in bad[0]


def test_a_full_disk_leaves_nothing_half_written(shards, vae, tmp_path, monkeypatch, capsys):
    arguments = [f"shards={shards}", f"vae={vae}", f"out={tmp_path / 'out'}"]
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert run(*arguments) == 2
    assert "No space left on device; finished shards are kept" in capsys.readouterr().err
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
        ({"vae": lacking}, "its VAE lacks the tensor quant_conv.weight"),
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
    assert not list((tmp_path / "out").glob("shard-*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_an_error(shards, vae, tmp_path, capsys):
    assert run(f"shards={shards}", f"vae={vae}", f"out={tmp_path}", "device=cuda") == 2
    assert "device = cuda, LOCAL_RANK = 0, but PyTorch finds 0 GPU(s): set device=cpu" in capsys.readouterr().err
