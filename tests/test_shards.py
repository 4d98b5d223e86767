"""data/making.py and data/shards.py: deterministic bytes, kill and resume, order as a function of position, bad shards."""

import io
import json
import tarfile
from itertools import islice

import numpy as np
import pytest
from conftest import make_shards

from teasr.data.making import PrepConfig, finish, make_plan, process_shard
from teasr.data.shards import (
    DataConfig,
    PairStream,
    ShardSet,
    batches,
    check_shards,
    check_streams,
    decode,
    read_shard,
    slots,
)


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


def test_same_settings_same_bytes_other_seed_other(photos, shards, tmp_path):
    again = make_shards(photos, tmp_path / "a")
    assert index(again)["set_sha256"] == index(shards)["set_sha256"]
    other = make_shards(photos, tmp_path / "b", seed=1)
    assert index(other)["set_sha256"] != index(shards)["set_sha256"]


def test_interrupted_making_goes_on_to_the_same_set(photos, shards, tmp_path):
    """Half a set, a shard without manifest and a torn temporary file are what a kill leaves behind."""
    out = make_shards(photos, tmp_path / "a")
    whole = index(out)["set_sha256"]
    kept = out / "shard-000000.tar"
    before = kept.stat().st_mtime_ns
    (out / "shard-000001.json").unlink()
    (out / "shard-000002.tar").write_bytes(b"torn")
    (out / "shard-000003.tar").unlink()
    (out / "index.json").unlink()
    make_shards(photos, out)
    assert index(out)["set_sha256"] == whole == index(shards)["set_sha256"]
    assert kept.stat().st_mtime_ns == before  # a finished shard is not made again


def test_new_settings_replace_the_old_set(photos, tmp_path):
    out = make_shards(photos, tmp_path / "a", crops_per_photo=16)
    assert len(list(out.glob("*.tar"))) == 4
    make_shards(photos, out, crops_per_photo=4)
    assert len(list(out.glob("*.tar"))) == 1 and len(ShardSet.open(str(out))) == 12


def test_members_are_a_pair_and_its_story(shards):
    raw = read_shard(f"{shards}/shard-000000.tar")
    assert len(raw) == 12
    sample = decode(raw[0])
    assert sample.hq.shape == (64, 64, 3) and sample.lq.shape == (16, 16, 3)
    record = json.loads(raw[0]["json"])
    assert record["degradation"]["preset"] == "osediff" and record["crop"][2:] == [64, 64]
    assert record["source"] in ("coffee.png", "chelsea.png", "rocket.jpg")


def test_grid_layout_takes_every_whole_crop_once(photos, tmp_path):
    out = make_shards(photos, tmp_path / "grid", layout="grid", crop_px=128, shard_samples=64)
    boxes = [
        (*json.loads(r["json"])["crop"][:2], json.loads(r["json"])["source"])
        for r in read_shard(f"{out}/shard-000000.tar")
    ]
    assert len(boxes) == len(set(boxes)) == 4 * 3 + 3 * 2 + 5 * 3


def test_scaled_crops_come_from_the_shrunken_photo(photos, tmp_path):
    out = make_shards(photos, tmp_path / "scaled", scales=(1.0, 0.25), crops_per_photo=8)
    records = [json.loads(r["json"]) for i in range(2) for r in read_shard(f"{out}/shard-{i:06d}.tar")]
    assert sorted({r["scale"] for r in records}) == [0.25, 1.0]
    for r in records:
        width, height = r["size"]
        assert r["crop"][0] + 64 <= width * r["scale"] + 1 and r["crop"][1] + 64 <= height * r["scale"] + 1
    assert sum(r["scale"] == 0.25 for r in records) == 12
    with pytest.raises(ValueError, match="scales"):
        PrepConfig(photos="x", out="y", scales=(2.0,))


def test_unusable_pictures_are_skipped_and_named(photos, tmp_path):
    from PIL import Image

    folder = tmp_path / "mixed pictures é"
    folder.mkdir()
    data = (photos / "coffee.png").read_bytes()
    (folder / "good.PNG").write_bytes(data)
    (folder / "twin.png").write_bytes(data)
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    Image.new("RGB", (20, 20)).save(folder / "small.png")
    out = make_shards(folder, tmp_path / "out")
    skipped = {s["name"]: s["reason"] for s in index(out)["skipped"]}
    assert (
        "same bytes" in skipped["twin.png"]
        and "20x20" in skipped["small.png"]
        and "cannot be read" in skipped["torn.jpg"]
    )
    (folder / "good.PNG").unlink()
    (folder / "twin.png").unlink()
    with pytest.raises(ValueError, match="none of the 2 pictures"):
        make_plan(PrepConfig(photos=str(folder), out="x", crop_px=64))
    with pytest.raises(ValueError, match="holds no pictures"):
        make_plan(PrepConfig(photos=str(tmp_path / "out"), out="x", crop_px=64))


def test_order_is_the_same_for_any_number_of_ranks_and_workers(shards):
    """Update k trains on the same pictures with 1, 2 or 4 ranks: rank r holds every world-th sample."""
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
        assert [p for *_, p in whole[v]] == list(range(30))


def test_augmentation_turns_both_pictures_alike(shards):
    config = DataConfig(str(shards), augment="dihedral")
    stream = PairStream(ShardSet.open(str(shards)), config, 0, 0, 1, 0)
    plain = PairStream(ShardSet.open(str(shards)), DataConfig(str(shards), augment="none"), 0, 0, 1, 0)
    turned = 0
    for (hq, lq, *_), (hq0, *_) in islice(zip(stream, plain, strict=False), 12):
        assert np.corrcoef(hq.flatten(), lq.flatten())[0, 1] > 0.5  # still the same scene
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
    named = [names for *_, names in islice(iter(stream), 48) if names]
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
        (lambda out: (out / "index.json").write_text('{"format": 1, "shards": []}'), "holds no samples"),
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


def test_a_full_disk_leaves_nothing_half_written(photos, tmp_path, monkeypatch):
    import os

    plan = make_plan(PrepConfig(photos=str(photos), out=str(tmp_path), crop_px=64, crops_per_photo=2))
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        process_shard(plan, 0)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    finish(plan, [process_shard(plan, 0)])
    assert len(ShardSet.open(str(tmp_path))) == 6
