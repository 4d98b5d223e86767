"""data/shards.py: order as a function of position, augmentation, broken data, URLs, online degradation."""

import io
import json
import os
import tarfile
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import make_shards
from PIL import Image

from teasr.config import strict_yaml as cfg
from teasr.data.config import DataConfig
from teasr.data.shards import ShardSet, decode, read_shard
from teasr.data.stream import PairStream, batches, check_shards, check_streams, slots
from teasr.imaging import images


def index(folder):
    return json.loads((folder / "index.json").read_text())


def keys(shards, seed=0, rank=0, world=1, first=0, n=60, **config):
    stream = PairStream(ShardSet.open(str(shards)), DataConfig(str(shards), **config), seed, rank, world, first)
    return [sample[2] for sample in islice(iter(stream), n)]


def rewrite(path, change):
    """Rewrite a tar with `change(name, data) -> data or None`."""
    members = []
    with tarfile.open(path) as tar:
        for info in tar:
            members.append((info.name, tar.extractfile(info).read()))
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            data = change(name, data)
            if data is not None:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def test_members_are_a_pair_and_its_story(shards):
    raw = read_shard(f"{shards}/shard-000000.tar")
    assert len(raw) == 12
    sample = decode(raw[0])
    assert sample.hq.shape == (64, 64, 3) and sample.lq.shape == (16, 16, 3)
    record = json.loads(raw[0]["json"])
    assert record["degradation"][0]["preset"] == "osediff" and record["crop"][2:] == [64, 64]
    assert record["source"] in ("coffee.png", "chelsea.png", "rocket.jpg")


def test_order_is_the_same_for_any_number_of_ranks_and_workers(shards):
    """Update k trains on the same images with 1, 2 or 4 ranks: rank r reads every world-th sample."""
    one = keys(shards)
    for world in (2, 4):
        ranks = [keys(shards, rank=r, world=world, n=60 // world) for r in range(world)]
        assert [k for row in zip(*ranks, strict=True) for k in row] == one
    config = DataConfig(str(shards), workers=2)
    stream = PairStream(ShardSet.open(str(shards)), config, 0, 0, 1, 0)
    loaded = [k for batch, _ in islice(batches(stream, 4), 6) for k in batch.keys]
    assert loaded == one[:24]


def test_position_needs_no_other_state_than_its_number(shards):
    one = keys(shards, n=150)
    for first in (1, 7, 48, 100):
        assert keys(shards, first=first, n=20) == one[first : first + 20]
    assert keys(shards, rank=1, world=2, first=40, n=10) == one[81:101:2]


def test_every_sample_once_an_epoch_and_epochs_differ(shards):
    one = keys(shards, n=96)
    assert len(set(one[:48])) == 48 and len(set(one[48:])) == 48
    assert one[:48] != one[48:] and one[:48] != sorted(one[:48])
    assert keys(shards, seed=1, n=48) != one[:48]


def test_slots_with_uneven_shards():
    shards = ShardSet("x", ("a", "b", "c"), (3, 1, 4), (0, 0, 0), {})
    whole = [list(islice(slots(shards, 0, v, 2, 0), 30)) for v in (0, 1)]
    for v in (0, 1):
        assert list(islice(slots(shards, 0, v, 2, 11), 5)) == whole[v][11:16]
        assert [slot.position for slot in whole[v]] == list(range(30))


def test_several_sets_are_read_as_one(photos, shards, tmp_path):
    light = make_shards(photos, tmp_path / "light", degradation="stablesr", seed=3)
    both = cfg.convert(DataConfig, {"shards": [str(shards), str(light)]}, "data")
    joined = ShardSet.open(*both.locations)
    assert len(joined) == 96 and joined.settings["crop_px"] == ShardSet.open(str(shards)).settings["crop_px"]
    stream = PairStream(joined, both, 0, 0, 1, 0)
    epoch = list(islice(slots(joined, 0, 0, 1, 0), 96))
    assert len({(slot.shard, slot.place) for slot in epoch}) == 96
    first_half = [slot.shard < len(joined.urls) // 2 for slot in epoch[:48]]
    assert any(first_half) and not all(first_half), "one set is read after the other"
    assert next(iter(stream))[0].shape == (3, 64, 64)
    online = DataConfig(both.shards, degrade="online")
    with pytest.raises(ValueError, match=r"different settings \(degradation\).*data.degrade=stored"):
        PairStream(joined, online, 0, 0, 1, 0)
    varied = make_shards(photos, tmp_path / "varied", variants=2)
    with pytest.raises(ValueError, match="varied has 2: sets that are read together need the same number"):
        ShardSet.open(str(shards), str(varied))
    with pytest.raises(ValueError, match="empty list"):
        DataConfig(())


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_carry_the_factor_of_their_set(photos, shards, tmp_path, workers):
    """The sets hold crops of different photographs, which tells where a sample comes from."""
    other = make_shards(photos, tmp_path / "other", seed=9)
    both = (str(shards), str(other))
    config = DataConfig(both, streams=2, workers=workers, augment="none", perceptual=(1.0, 0.25))
    first = PairStream(ShardSet.open(both[0]), DataConfig(both[0], augment="none"), 0, 0, 1, 0)
    own = {pair.x_hq.numpy().tobytes() for pair in islice(first, 48)}
    stream = PairStream(ShardSet.open(*both), config, 0, 0, 1, 0)
    found = [batch for batch, _ in islice(batches(stream, 4), 24)]
    for batch in found:
        for x, factor in zip(batch.x_hq, batch.perceptual, strict=True):
            pixels = ((x + 1) * 127.5).round().to(torch.uint8).numpy().tobytes()
            assert factor == (1.0 if pixels in own else 0.25)
    assert len({float(f) for batch in found for f in batch.perceptual}) == 2
    with pytest.raises(ValueError, match=r"data.perceptual = \(1.0,\): must be one number >= 0 for each of the 2"):
        DataConfig(both, perceptual=(1.0,))


def test_augmentation_turns_both_pictures_alike(shards):
    config = DataConfig(str(shards), augment="dihedral")
    stream = PairStream(ShardSet.open(str(shards)), config, 0, 0, 1, 0)
    plain = PairStream(ShardSet.open(str(shards)), DataConfig(str(shards), augment="none"), 0, 0, 1, 0)
    turned = 0
    for (hq, lq, *_), (hq0, *_) in islice(zip(stream, plain, strict=False), 12):
        assert np.corrcoef(hq.flatten(), lq.flatten())[0, 1] > 0.5  # HQ and LQ still show the same scene
        assert sorted(hq.flatten().tolist()) == sorted(hq0.flatten().tolist())
        turned += not np.array_equal(hq, hq0)
    assert turned >= 6


def test_a_broken_sample_is_replaced_named_and_shifts_nothing(photos, shards, tmp_path):
    out = make_shards(photos, tmp_path / "a")
    bad = "000000005"
    rewrite(out / "shard-000000.tar", lambda n, d: d[:40] if n == f"{bad}.lq.png" else d)
    good, broken = keys(shards, n=48), keys(out, n=48)
    assert [a for a, b in zip(good, broken, strict=True) if a != b] == [bad]
    stream = PairStream(ShardSet.open(str(out)), DataConfig(str(out)), 0, 0, 1, 0)
    named = [pair.bad for pair in islice(iter(stream), 48) if pair.bad]
    assert len(named) == 1 and f"{bad}.lq.png" in named[0][0]


def test_a_missing_member_is_named(photos, tmp_path):
    out = make_shards(photos, tmp_path / "a")
    rewrite(out / "shard-000000.tar", lambda n, d: None if n == "000000000.hq.png" else d)
    with pytest.raises(ValueError, match=r"000000000\.hq\.png is missing"):
        decode(read_shard(f"{out}/shard-000000.tar")[0])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda out: (out / "index.json").unlink(), "holds no index.json"),
        (lambda out: (out / "index.json").write_text("{"), "cannot be used"),
        (lambda out: (out / "index.json").write_text('{"format": 2, "shards": []}'), "holds no samples"),
        (lambda out: (out / "index.json").write_text('{"format": 1, "shards": []}'), "make the shards again"),
        (lambda out: (out / "shard-000002.tar").unlink(), r"shard-000002\.tar cannot be read"),
        (lambda out: (out / "shard-000002.tar").write_bytes(b"x" * 1000), r"shard-000002\.tar cannot be read"),
        (lambda out: rewrite(out / "shard-000001.tar", lambda n, d: b"?"), r"shard-000001\.tar holds no usable sample"),
    ],
)
def test_damaged_sets_are_refused_before_training(photos, tmp_path, harm, message):
    out = make_shards(photos, tmp_path / "a")
    harm(out)
    with pytest.raises(ValueError, match=message):
        check_shards(ShardSet.open(str(out)), lambda h, w: None)


def test_streams_must_fit_ranks_workers_and_shards(shards):
    opened = ShardSet.open(str(shards))
    with pytest.raises(ValueError, match="multiple of 3"):
        check_streams(opened, DataConfig("x", streams=4), world=3)
    with pytest.raises(ValueError, match=r"data\.streams=4"):
        check_streams(opened, DataConfig("x", streams=8), world=1)


def stream_of(out, n, **config):
    stream = PairStream(ShardSet.open(str(out)), DataConfig(str(out), **config), 0, 0, 1, 0)
    return list(islice(iter(stream), n))


@pytest.mark.parametrize("harm", ["missing", "truncated", "empty", "noise"])
def test_a_broken_shard_is_stood_in_for_by_another_and_shifts_nothing(photos, shards, tmp_path, harm):
    """Its 12 samples are reported; every other sample keeps its position."""
    out = make_shards(photos, tmp_path / "a")
    path = out / "shard-000002.tar"
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": path.read_bytes()[:70], "empty": b"", "noise": bytes(range(256)) * 40}[harm])
    good, found = keys(shards, n=96), stream_of(out, 96)
    lost = [i for i, key in enumerate(good) if 24 <= int(key) < 36]
    assert [i for i, (a, b) in enumerate(zip(good, found, strict=True)) if a != b[2]] == lost and len(lost) == 24
    assert [i for i, row in enumerate(found) if row[3]] == lost
    assert all("shard-000002.tar" in row[3][0] for row in found if row[3])
    assert not {row[2] for row in found} & {f"{i:09d}" for i in range(24, 36)}


def test_a_shard_that_ends_early_is_noticed_and_shifts_nothing(photos, shards, tmp_path):
    """A tar cut between two members can be read without an error; its lost samples are reported, the others stay."""
    out = make_shards(photos, tmp_path / "a")
    rewrite(out / "shard-000001.tar", lambda name, data: None if int(name[:9]) >= 18 else data)
    good, found = keys(shards, n=48), stream_of(out, 48)
    differ = [a for a, b in zip(good, found, strict=True) if a != b[2]]
    assert sorted(differ) == [f"{i:09d}" for i in range(18, 24)]
    assert all("holds 6 of 12 samples" in row[3][0] for row in found if row[3]) and sum(bool(r[3]) for r in found) == 6
    torn = out / "shard-000002.tar"
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    found = stream_of(out, 48)
    assert any("shard-000002.tar" in name for row in found for name in row[3])


@pytest.mark.parametrize("fmt", ["png", "webp-lossless", "jpeg98"])
def test_a_flipped_bit_in_any_member_is_noticed(photos, tmp_path, fmt):
    """WebP and JPEG decode flipped bits without an error, so the sample's JSON holds their checksums."""
    out = make_shards(photos, tmp_path / "a", hq_format=fmt)
    target = []

    def flip(name, data):
        if name.startswith("000000003.hq."):
            target.append(name)
            data = bytearray(data)
            data[len(data) // 2] ^= 16
        return bytes(data)

    rewrite(out / "shard-000000.tar", flip)
    named = [name for row in stream_of(out, 48) for name in row[3]]
    assert len(named) == 1 and target[0] in named[0]


def test_too_many_broken_samples_stop_the_run(photos, tmp_path):
    out = make_shards(photos, tmp_path / "a")
    (out / "shard-000002.tar").unlink()
    for share, stops in ((0.01, True), (0.3, False)):
        stream = PairStream(ShardSet.open(str(out)), DataConfig(str(out), max_bad_share=share), 0, 0, 1, 0)
        if stops:
            with pytest.raises(
                ValueError, match=r"9 of \d+ samples are broken, more than data.max_bad_share = 0.01 .*teasr verify"
            ):
                list(islice(batches(stream, 4), 24))
        else:
            assert sum(len(names) for _, names in islice(batches(stream, 4), 24)) == 24
    with pytest.raises(ValueError, match="1 of 4 checked shards are bad"):
        check_shards(ShardSet.open(str(out)), lambda h, w: None, 0.01)
    assert len(check_shards(ShardSet.open(str(out)), lambda h, w: None, 0.3)) == 1


def test_nothing_left_to_stand_in_is_an_error(photos, tmp_path):
    out = make_shards(photos, tmp_path / "a")
    for path in out.glob("*.tar"):
        path.unlink()
    with pytest.raises(ValueError, match=r"no shard of .* can be used"):
        stream_of(out, 1)


def test_urls_as_webdataset_opens_them(shards):
    """A pipe with {name} in place of the file, and file: URLs, read the same samples as the folder."""
    folder = keys(shards, n=50)
    assert keys(f"pipe:cat {shards}/{{name}}", n=50) == folder
    assert keys(f"file:{shards}", n=50) == folder
    with pytest.raises(ValueError, match="cannot be used"):
        ShardSet.open("pipe:cat /nowhere/{name} 2>/dev/null")


def test_s3_goes_through_the_aws_command(shards, tmp_path, monkeypatch):
    """A stand-in replaces the aws command, since there is no bucket here."""
    aws = tmp_path / "bin/aws"
    aws.parent.mkdir()
    aws.write_text(f'#!/bin/sh\n[ "$1 $2 $4" = "s3 cp -" ] && exec cat "{shards}/${{3#s3://my-bucket/a set/}}"\n')
    aws.chmod(0o755)
    monkeypatch.setenv("PATH", f"{aws.parent}:{os.environ['PATH']}")
    assert keys("s3://my-bucket/a set", n=50) == keys(shards, n=50)


def test_variants_take_turns_by_epoch(photos, tmp_path):
    """Over K epochs, every variant of a sample is used once."""
    out = make_shards(photos, tmp_path / "k", variants=2)
    seen = {}
    for _, lq, key, *_ in stream_of(out, 96, augment="none"):
        seen.setdefault(key, []).append(lq)
    assert all(len(pair) == 2 and not torch.equal(*pair) for pair in seen.values()) and len(seen) == 48


def test_online_degradation_is_new_each_epoch_and_a_function_of_the_position(photos, shards, tmp_path):
    config = {"degrade": "online", "augment": "none"}
    stored, online = stream_of(shards, 96, augment="none"), stream_of(shards, 96, **config)
    assert [row[2] for row in stored] == [row[2] for row in online]
    assert all(torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1]) for a, b in zip(stored, online, strict=True))
    by_key = {}
    for _, lq, key, *_ in online:
        by_key.setdefault(key, []).append(lq)
    assert all(not torch.equal(*pair) for pair in by_key.values())
    stream = PairStream(ShardSet.open(str(shards)), DataConfig(str(shards), **config), 0, 0, 1, 40)
    assert torch.equal(next(iter(stream))[1], online[40][1])
    ranks = [PairStream(ShardSet.open(str(shards)), DataConfig(str(shards), **config), 0, r, 2, 10) for r in (0, 1)]
    assert all(torch.equal(next(iter(s))[1], online[20 + r][1]) for r, s in enumerate(ranks))


def test_online_degradation_with_another_preset_sharpens_what_it_must(shards, photos, tmp_path):
    plain = stream_of(shards, 12, augment="none")
    usm = stream_of(shards, 12, augment="none", degrade="online", degradation="realesrgan_usm")
    # not all 12, since a night sky has no edges to sharpen
    assert sum(not torch.equal(a[0], b[0]) for a, b in zip(plain, usm, strict=True)) >= 6
    made = make_shards(photos, tmp_path / "usm", degradation="realesrgan_usm")
    again = stream_of(made, 12, augment="none", degrade="online")
    assert all(torch.equal(a[0], b[0]) for a, b in zip(stream_of(made, 12, augment="none"), again, strict=True))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(usm, again, strict=True))  # stored and online degradation agree
    with pytest.raises(ValueError, match=r"set data.degrade=online too"):
        DataConfig("x", degradation="osediff")
    pairs = ShardSet("x", ("a",), (1,), (1,), {"lq": "LR"})
    with pytest.raises(ValueError, match="holds real pairs"):
        PairStream(pairs, DataConfig("x", streams=1, degrade="online"), 0, 0, 1, 0)


def test_upsampling_is_pillows_bicubic():
    """Equal up to one level in 1 of 1,000 values. It commutes with mirroring, so the reader may mirror the LQ image."""
    x = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)
    up = images.upsample(x, 4)
    difference = np.abs(up.astype(int) - np.asarray(Image.fromarray(x).resize((256, 192), Image.Resampling.BICUBIC)))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
    assert np.array_equal(images.upsample(x[:, ::-1], 4), up[:, ::-1])
