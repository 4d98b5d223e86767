"""From photographs to shards: deterministic bytes, kill and resume, layouts, formats, paired sets, inputs, engines."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from conftest import ROOT, make_shards
from PIL import Image

from teasr.data.prep import engines, sources
from teasr.data.prep.job import make_set
from teasr.data.prep.making import process_shard
from teasr.data.prep.plan import PrepConfig, make_plan
from teasr.data.shards import ShardSet, decode, read_shard
from teasr.imaging import finding, images

COFFEE = skimage.data.coffee()


def index(folder):
    return json.loads((Path(folder) / "index.json").read_text())


def set_hash(folder):
    return index(folder)["set_sha256"]


def records(folder):
    names = [s["shard"] for s in index(folder)["shards"]]
    return [json.loads(raw["json"]) for name in names for raw in read_shard(f"{folder}/{name}")]


def samples(folder, variant=0):
    names = [s["shard"] for s in index(folder)["shards"]]
    return [decode(raw, variant) for name in names for raw in read_shard(f"{folder}/{name}")]


def config_of(photos, out, **settings):
    """The config that `command` and `make_shards` of conftest.py use."""
    defaults = {"crop_px": 64, "crops_per_photo": 16, "shard_samples": 12}
    return PrepConfig(photos=str(photos), out=str(out), **(defaults | settings))


def plan_of(photos, out, **settings):
    config = PrepConfig(photos=str(photos), out=str(out), **({"crop_px": 64, "crops_per_photo": 2} | settings))
    chunks, problems = sources.find(Path(photos), Path(out))
    return make_plan(config, [row for chunk in chunks for row in sources.inspect_chunk(chunk)] + problems)


def command(photos, out, *more):
    settings = ("crop_px=64", "crops_per_photo=16", "shard_samples=12")
    return [sys.executable, "data_prep/make_shards.py", f"photos={photos}", f"out={out}", *settings, *more]


def run(photos, out, *more, env=None):
    done = subprocess.run(
        command(photos, out, *more), cwd=ROOT, env=os.environ | (env or {}), capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


# bytes


def test_same_settings_same_bytes_other_seed_other(photos, shards, tmp_path):
    again = make_shards(photos, tmp_path / "a")
    assert set_hash(again) == set_hash(shards)
    assert set_hash(make_shards(photos, tmp_path / "b", seed=1)) != set_hash(shards)


def test_interrupted_making_goes_on_to_the_same_set(photos, shards, tmp_path):
    """A killed run leaves an incomplete set, a shard without manifest and a partial temporary file."""
    out = make_shards(photos, tmp_path / "a")
    kept = out / "shard-000000.tar"
    before = kept.stat().st_mtime_ns
    (out / "shard-000001.json").unlink()
    (out / "shard-000002.tar").write_bytes(b"torn")
    (out / "shard-000003.tar").unlink()
    (out / "index.json").unlink()
    host = re.sub(r"[^A-Za-z0-9_]", "_", socket.gethostname())
    zombie = subprocess.Popen(["true"])  # it has ended, but its exit status has not been read
    time.sleep(0.2)
    others = [f".shard-000003.tar.{host}-{os.getppid()}.tmp", ".shard-000003.tar.elsewhere-1.tmp"]
    for name in (*others, f".shard-000003.tar.{host}-99999999.tmp", f".shard-000003.tar.{host}-{zombie.pid}.tmp"):
        (out / name).write_bytes(b"x")
    make_shards(photos, out)
    assert set_hash(out) == set_hash(shards)
    assert kept.stat().st_mtime_ns == before  # a finished shard is not written again
    # temporary files of dead processes of this machine are removed
    assert {p.name for p in out.glob(".*.tmp")} == set(others)
    zombie.wait()


@pytest.mark.parametrize("engine", ["local", "split"])
def test_killed_at_random_moments_the_same_command_ends_with_the_same_hash(photos, shards, tmp_path, engine):
    """SIGKILL of the whole job including its workers, at five moments of its run; bench/kill_shards.py does more."""
    split = {"RANK": "0", "WORLD_SIZE": "1"} if engine == "split" else {}
    for k in range(5):
        job = subprocess.Popen(
            command(photos, tmp_path / "out", "--workers", "2"), cwd=ROOT, env=os.environ | split,
            stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        time.sleep(0.4 + 0.35 * k)
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    code, said, errors = run(photos, tmp_path / "out", "--workers", "2", env=split)
    assert code == 0, errors
    assert set_hash(tmp_path / "out") == set_hash(shards) and set_hash(shards)[:12] in said


def test_a_full_disk_leaves_nothing_half_written_and_what_is_finished_stays(photos, tmp_path, monkeypatch):
    plan = plan_of(photos, tmp_path, shard_samples=3)
    process_shard(plan.shards[0])
    before = sorted(p.name for p in tmp_path.iterdir())
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        process_shard(plan.shards[1])
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    monkeypatch.undo()
    make_set(plan.config, overwrite=True)
    assert len(ShardSet.open(str(tmp_path))) == 6


def test_a_photo_that_changes_meanwhile_is_an_error_that_names_it(photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    plan = plan_of(folder, tmp_path / "out")
    Image.fromarray(COFFEE[::-1]).save(folder / "coffee.png")
    with pytest.raises(ValueError, match=r"coffee\.png has changed since it was inspected"):
        process_shard(plan.shards[0])
    assert plan_of(folder, tmp_path / "out").photos[1].sha256 != plan.photos[1].sha256  # the photo is analysed again


# engines


def test_settings_may_come_before_and_after_options(photos, tmp_path):
    code, said, errors = run(photos, tmp_path / "out", "--workers", "1", 'licences={.: "free, they say"}', "variants=2")
    assert code == 0 and "x 2 variants" in said, errors
    assert "| 3 | free, they say |" in (tmp_path / "out/README.md").read_text()


def test_rank_split_gives_the_same_set(photos, shards, tmp_path):
    """Three array jobs one after another: the last one to finish writes the index."""
    for rank in ("2", "0", "1"):
        assert not (tmp_path / "out/index.json").exists()
        code, said, errors = run(photos, tmp_path / "out", env={"RANK": rank, "WORLD_SIZE": "3"})
        assert code == 0, errors
    assert set_hash(tmp_path / "out") == set_hash(shards) and "sha256" in said
    code, _, errors = run(photos, tmp_path / "out", env={"RANK": "3", "WORLD_SIZE": "3"})
    assert code == 2 and "RANK must be 0" in errors


def _die_once(spec, on_done):
    """A task that kills its own worker when it first gets spec 3, halfway through its work."""
    number, folder = spec
    on_done(1)
    marker = Path(folder) / "died"
    if number == 3 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    on_done(1)
    return number * 10


def _die_always(spec, on_done):
    os.kill(os.getpid(), signal.SIGKILL)


def _complain(spec, on_done):
    raise ValueError(f"spec {spec} is no good")


def test_a_worker_that_dies_is_replaced_and_the_job_goes_on(tmp_path):
    done = []
    specs = [(i, str(tmp_path)) for i in range(6)]
    assert engines.run(_die_once, specs, "local", 2, done.append) == [0, 10, 20, 30, 40, 50]
    assert (tmp_path / "died").exists() and sum(done) == 12  # the half that was lost is not counted twice


def test_a_part_that_kills_every_worker_is_given_up_with_a_reason():
    with pytest.raises(OSError, match=r"died 3 times .*exit code -9"):
        engines.run(_die_always, [1, 2], "local", 2, lambda n: None)


def _stumble(spec, on_done):
    return {}[spec]


def test_an_error_in_a_worker_reaches_the_user():
    with pytest.raises(ValueError, match="spec 1 is no good"):
        engines.run(_complain, [1, 1], "local", 2, lambda n: None)
    with pytest.raises(RuntimeError, match="KeyError: 7"):  # and not "a worker process died"
        engines.run(_stumble, [7, 7], "local", 2, lambda n: None)


def test_ray_gives_the_same_set_and_survives_a_killed_worker(photos, shards, tmp_path):
    """A Ray worker process is killed while tasks run; Ray retries, and the set is the same."""
    import psutil

    job = subprocess.Popen(
        command(photos, tmp_path / "out", "--engine", "ray"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    killed = 0
    while job.poll() is None and not killed:
        for process in psutil.Process(job.pid).children(recursive=True) if job.poll() is None else []:
            try:
                if "_ray_task" in " ".join(process.cmdline()):
                    process.kill()
                    killed += 1
                    break
            except psutil.Error:
                continue
        time.sleep(0.005)
    _, errors = job.communicate()
    assert job.returncode == 0, errors
    assert killed, "no Ray worker was seen at work"
    assert set_hash(tmp_path / "out") == set_hash(shards)


# layouts and formats


def test_grid_layout_takes_every_whole_crop_once(photos, tmp_path):
    out = make_shards(photos, tmp_path / "grid", layout="grid", crop_px=128, shard_samples=64)
    boxes = [(*r["crop"][:2], r["source"]) for r in records(out)]
    assert len(boxes) == len(set(boxes)) == 4 * 3 + 3 * 2 + 5 * 3


def test_scaled_crops_come_from_the_shrunken_photo(photos, tmp_path):
    out = make_shards(photos, tmp_path / "scaled", scales=(1.0, 0.25), crops_per_photo=8)
    rows = records(out)
    assert sorted({r["scale"] for r in rows}) == [0.25, 1.0]
    for r in rows:
        width, height = r["size"]
        assert r["crop"][0] + 64 <= width * r["scale"] + 1 and r["crop"][1] + 64 <= height * r["scale"] + 1
    assert sum(r["scale"] == 0.25 for r in rows) == 12


def test_of_several_candidates_the_crop_with_the_most_detail_is_taken(tmp_path):
    rng, picture = np.random.default_rng(0), np.full((256, 512, 3), 90, np.uint8)
    picture[:, 384:] = rng.integers(0, 255, (256, 128, 3))  # a quarter of it is not flat
    (tmp_path / "in").mkdir()
    Image.fromarray(picture).save(tmp_path / "in/half_flat.png")
    common = {"crops_per_photo": 40, "min_sharpness": 0, "min_contrast": 0}
    first, best = (make_shards(tmp_path / "in", tmp_path / str(n), candidates=n, **common) for n in (1, 8))
    textured = [np.mean([pair.hq.std() > 5 for pair in samples(out)]) for out in (first, best)]
    assert textured[0] < 0.5 and textured[1] > 0.8
    for row, pair in zip(records(best), samples(best), strict=True):
        left, top, n, _ = row["crop"]
        assert np.array_equal(pair.hq, picture[top : top + n, left : left + n])
    with pytest.raises(ValueError, match="candidates = 8: layout = grid takes every place"):
        config_of(tmp_path / "in", tmp_path / "x", candidates=8, layout="grid")


def test_variants_are_other_degradations_of_one_hq(photos, shards, tmp_path):
    out = make_shards(photos, tmp_path / "k", variants=3, crops_per_photo=2)
    with tarfile.open(out / "shard-000000.tar") as tar:
        assert tar.getnames()[:5] == [f"000000000.{m}" for m in ("hq.png", "lq.png", "lq.1.png", "lq.2.png", "json")]
    three = [samples(out, v) for v in range(3)]
    for a, b, c in zip(*three, strict=True):
        assert np.array_equal(a.hq, b.hq) and not np.array_equal(a.lq, b.lq) and not np.array_equal(b.lq, c.lq)
    assert len(records(out)[0]["degradation"]) == 3


def test_lossless_formats_hold_the_same_pictures_and_jpeg98_nearly(photos, shards, tmp_path):
    png = samples(shards)
    webp = samples(make_shards(photos, tmp_path / "w", hq_format="webp-lossless"))
    jpeg = samples(make_shards(photos, tmp_path / "j", hq_format="jpeg98", keep_jpeg=False))
    for a, b, c in zip(png, webp, jpeg, strict=True):
        assert np.array_equal(a.hq, b.hq) and np.array_equal(a.lq, b.lq) and np.array_equal(a.lq, c.lq)
        assert 0 < np.abs(a.hq.astype(int) - c.hq).mean() < 1.5


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_a_jpeg_photo_is_cut_without_a_second_loss(tmp_path, subsampling):
    """Its pixels are those of the photo; only at the border is chroma interpolated without the neighbouring pixels."""
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(COFFEE).save(folder / "a.jpg", quality=80, subsampling=subsampling)
    out = make_shards(folder, tmp_path / "out", hq_format="jpeg98", crops_per_photo=6)
    photo = images.read_rgb(folder / "a.jpg")
    for sample, record in zip(samples(out), records(out), strict=True):
        left, top, n, _ = record["crop"]
        assert record["jpeg_kept"]
        whole = photo[top : top + n, left : left + n]
        assert np.array_equal(sample.hq[2:-2, 2:-2], whole[2:-2, 2:-2])
        assert np.abs(sample.hq.astype(int) - whole).max() <= 40


def test_a_damaged_jpeg_that_decoders_accept_is_skipped_and_named(photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    Image.fromarray(COFFEE[::-1]).save(folder / "bad.jpg", quality=90)
    data = bytearray((folder / "bad.jpg").read_bytes())
    at = data.index(b"\xff\xda") + 2000  # in the coefficients
    data[at : at + 2] = b"\xff\xc9"
    (folder / "bad.jpg").write_bytes(data)
    assert images.read_rgb(folder / "bad.jpg").shape == COFFEE.shape
    out = make_shards(folder, tmp_path / "out", hq_format="jpeg98", crops_per_photo=4)
    reasons = {row["name"]: row["reason"] for row in index(out)["skipped"]}
    assert reasons == {"bad.jpg": "broken: its JPEG data is damaged"}


@pytest.mark.parametrize("seed", range(2))
def test_no_damage_to_a_picture_ends_the_job(photos, tmp_path, seed):
    """Whatever Pillow and OpenCV raise for a picture with wrong bytes, it is skipped and named."""
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(photos / "coffee.png", folder)
    rng, small = np.random.default_rng(seed), Image.fromarray(COFFEE[:64, :80])
    kinds = [("png", {}), ("jpg", {}), ("webp", {}), ("tif", {}), ("tif", {"compression": "tiff_lzw"}), ("bmp", {})]
    for n in range(120):
        kind, how = kinds[n % len(kinds)]
        path = folder / f"{n}.{kind}"
        small.save(path, **how)
        data = bytearray(path.read_bytes())
        for at in rng.integers(0, 200, rng.integers(1, 4)):
            data[(at if rng.random() < 0.7 else -at - 1) % len(data)] = rng.choice([0, 1, 127, 128, 255])
        path.write_bytes(data)
    out = make_shards(folder, tmp_path / "out", crops_per_photo=1, min_sharpness=0, min_contrast=0)
    assert len(index(out)["sources"]) + len(index(out)["skipped"]) == 121


def test_a_jpeg_photo_that_must_change_is_encoded_anew(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    turned = Image.Exif()
    turned[images.ORIENTATION] = 6
    Image.fromarray(COFFEE).save(folder / "turned.jpg", quality=80, exif=turned)
    Image.fromarray(COFFEE[..., 0]).save(folder / "grey.jpg", quality=80)
    Image.fromarray(COFFEE[::-1]).convert("CMYK").save(folder / "cmyk.jpg", quality=80)
    out = make_shards(folder, tmp_path / "out", hq_format="jpeg98", crops_per_photo=2)
    rows = {r["source"]: r for r in records(out)}
    assert len(rows) == 3 and not any(r["jpeg_kept"] for r in rows.values())
    assert rows["turned.jpg"]["size"] == [400, 600]
    usm = make_shards(folder, tmp_path / "usm", hq_format="jpeg98", degradation="realesrgan_usm", crops_per_photo=2)
    assert not any(r["jpeg_kept"] for r in records(usm))


def test_usm_sharpens_what_is_stored_and_lq_comes_from_it(photos, shards, tmp_path):
    plain, sharp = samples(shards), samples(make_shards(photos, tmp_path / "usm", degradation="realesrgan_usm"))

    def detail(rows):
        return np.mean([np.abs(np.diff(s.hq.astype(float), axis=1)).mean() for s in rows])

    assert detail(sharp) > 1.05 * detail(plain)


def test_paired_pictures_are_cut_together(tmp_path):
    """Real LQ/HQ pairs with equal names and any suffix: crops correspond, and nothing is degraded."""
    hr, lr = tmp_path / "HR", tmp_path / "LR"
    (hr / "sub").mkdir(parents=True)
    (lr / "sub").mkdir(parents=True)
    hq = Image.fromarray(COFFEE)
    hq.save(hr / "sub/a.png")
    small = hq.resize((150, 100), Image.Resampling.BOX)
    small.save(lr / "sub/a.bmp")
    hq.save(hr / "alone.png")
    small.save(lr / "widow.png")
    Image.fromarray(COFFEE[::-1]).save(hr / "odd.png")
    hq.resize((300, 200)).save(lr / "odd.png")
    out = make_shards(hr, tmp_path / "out", lq=str(lr), crops_per_photo=8)
    for sample, record in zip(samples(out), records(out), strict=True):
        left, top, n, _ = record["crop"]
        assert left % 4 == top % 4 == 0 and "degradation" not in record and record["lq_source"] == "sub/a.bmp"
        assert np.array_equal(sample.hq, COFFEE[top : top + n, left : left + n])
        assert np.array_equal(sample.lq, np.asarray(small)[top // 4 : (top + n) // 4, left // 4 : (left + n) // 4])
    skipped = {row["name"]: row["reason"] for row in index(out)["skipped"]}
    assert skipped["alone.png"].startswith("unpaired") and skipped["LR/widow.png"].startswith("unpaired")
    assert skipped["odd.png"].startswith("sizes do not match")
    with pytest.raises(ValueError, match="do not set scales and variants"):
        PrepConfig(photos="x", out="y", lq="z", variants=2)


def test_the_data_card_names_sources_and_licences(photos, tmp_path):
    folder = tmp_path / "photos"
    (folder / "nasa").mkdir(parents=True)
    shutil.copy(photos / "coffee.png", folder / "coffee.png")
    shutil.copy(photos / "chelsea.png", folder / "nasa/cat.png")
    out = make_shards(folder, tmp_path / "out", licences={"nasa": "public domain"})
    text = (out / "README.md").read_text()
    assert "| 1 | public domain |" in text and "| 1 | not stated |" in text and set_hash(out) in text
    assert "photos" not in index(out)["settings"]  # a set holds no information about the machine that made it


# every kind of input


@pytest.fixture(scope="module")
def odd_pictures(tmp_path_factory) -> Path:
    """Valid and invalid images of every kind, in a folder whose name has spaces and non-ASCII letters."""
    folder = tmp_path_factory.mktemp("odd") / "mixed pictures é 写真"
    (folder / "deep/er").mkdir(parents=True)
    rgb = Image.fromarray(COFFEE)

    def variant(i):
        return Image.fromarray(np.roll(COFFEE, 40 * i, axis=1))

    rgb.save(folder / "good ü.PNG")
    shutil.copy(folder / "good ü.PNG", folder / "twin.png")
    rgb.save(folder / "deep/er/same_pixels.BMP")
    variant(1).save(folder / "a.JPEG", quality=90)
    variant(2).save(folder / "b.webp", quality=90)
    variant(3).save(folder / "c.Tif")
    variant(4).save(folder / "really_a_jpeg.png", format="JPEG")
    variant(5).convert("L").save(folder / "grey.png")
    variant(6).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.roll(COFFEE[..., 1], 99, 1).astype(np.uint16) * 257).save(folder / "grey16.png")
    import cv2

    cv2.imwrite(str(folder / "rgb16.tiff"), np.roll(COFFEE, 300, 1)[..., ::-1].astype(np.uint16) * 257)
    turned = Image.Exif()
    turned[images.ORIENTATION] = 6
    variant(7).save(folder / "turned.jpg", exif=turned, quality=90)
    opaque = variant(8).convert("RGBA")
    opaque.save(folder / "opaque.png")
    opaque.putalpha(Image.fromarray(np.tile(np.arange(600) % 256, (400, 1)).astype(np.uint8)))
    opaque.save(folder / "transparent.png")
    variant(9).save(folder / "animated.webp", save_all=True, append_images=[rgb], quality=50)
    data = (folder / "a.JPEG").read_bytes()
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 2])
    data = (folder / "good ü.PNG").read_bytes()
    (folder / "truncated.png").write_bytes(data[: len(data) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("RGB", (300, 300), "gray").save(folder / "flat.png")
    rgb.resize((40, 27)).resize((600, 400), Image.Resampling.BICUBIC).save(folder / "blurred.png")
    (folder / "bomb.png").write_bytes(bomb())
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    (folder / "linked").symlink_to(folder / "deep")
    (folder / "notes.txt").write_text("left alone")
    return folder


def bomb(side: int = 17_400) -> bytes:
    """A PNG of 300 megapixels in a few hundred kilobytes."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(1 + side // 8), 9) * 40
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)) + chunk(b"IDAT", rows)
    )


def test_every_kind_of_input_is_used_or_skipped_for_a_reason(odd_pictures, tmp_path):
    out = make_shards(odd_pictures, tmp_path / "out", crops_per_photo=1)
    assert {row["name"] for row in index(out)["sources"]} == {
        "deep/er/same_pixels.BMP", "a.JPEG", "b.webp", "c.Tif", "really_a_jpeg.png", "grey.png", "cmyk.jpg",
        "grey16.png", "rgb16.tiff", "turned.jpg", "opaque.png",
    }  # fmt: skip
    assert {row["name"]: row["reason"].split(":")[0] for row in index(out)["skipped"]} == {
        "good ü.PNG": "duplicate", "twin.png": "duplicate", "transparent.png": "transparent",
        "animated.webp": "broken", "truncated.jpg": "broken", "truncated.png": "broken", "empty.png": "broken",
        "text.png": "broken", "dot.png": "too small", "flat.png": "flat", "blurred.png": "blurred",
        "bomb.png": "broken",
        "dangling.png": "file cannot be read", "linked": "link to a folder",
    }  # fmt: skip
    assert len(records(out)) == 11


def test_the_summary_counts_and_names_reasons(odd_pictures, tmp_path):
    code, said, errors = run(odd_pictures, tmp_path / "out")
    assert code == 0, errors
    assert "from 11 photos" in said and "skipped 6: broken" in said and "skipped 2: duplicate" in said


def test_odd_pictures_are_read_right(odd_pictures):
    def grey(name):
        return images.read_rgb(odd_pictures / name)

    assert np.array_equal(grey("grey16.png")[..., 0], np.roll(COFFEE[..., 1], 99, 1))  # not clipped to white
    assert np.array_equal(grey("rgb16.tiff"), np.roll(COFFEE, 300, 1))
    assert grey("turned.jpg").shape == (600, 400, 3)
    assert np.abs(grey("cmyk.jpg").astype(int) - np.roll(COFFEE, 240, 1)).mean() < 12
    with pytest.raises(ValueError, match="animated"):
        grey("animated.webp")
    with pytest.raises(ValueError, match="pixels"):
        grey("bomb.png")


def test_colour_profiles_are_applied(tmp_path):
    """A profile with swapped red and green primaries swaps red and green; sRGB and damaged profiles have no effect."""
    import struct

    from PIL import ImageCms

    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = bytearray(srgb.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be")))
    tags = {bytes(swapped[p : p + 4]): p for p in range(132, 132 + 12 * struct.unpack(">I", srgb[128:132])[0], 12)}
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    swapped[red + 4 : red + 12], swapped[green + 4 : green + 12] = (
        srgb[green + 4 : green + 12],
        srgb[red + 4 : red + 12],
    )
    for name, profile in (("srgb", srgb), ("torn", b"not a profile"), ("swapped", bytes(swapped))):
        Image.fromarray(COFFEE).save(tmp_path / f"{name}.png", icc_profile=profile)
    for name in ("srgb", "torn"):
        assert np.array_equal(images.read_rgb(tmp_path / f"{name}.png"), COFFEE)
    assert np.abs(images.read_rgb(tmp_path / "swapped.png").astype(int) - COFFEE[..., [1, 0, 2]]).mean() < 2


def test_unreadable_folders_are_named(photos, tmp_path, monkeypatch):
    """Root can read everything, so the operating system's error is simulated."""
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "secret").mkdir()
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert finding.walk_pictures(folder) == (
        ["chelsea.png", "coffee.png", "rocket.jpg"],
        [("secret", "folder cannot be read: Permission denied")],
    )


def test_a_set_inside_the_folder_of_photos_is_not_taken_for_photos(photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    out = make_shards(folder, folder / "shards")
    Image.fromarray(COFFEE).save(out / "contact.png")
    whole = set_hash(out)
    make_shards(folder, out)
    assert set_hash(out) == whole


def test_nothing_usable_is_an_error(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    with pytest.raises(ValueError, match="contains no images"):
        make_shards(folder, tmp_path / "out")
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    Image.new("RGB", (20, 20)).save(folder / "small.png")
    with pytest.raises(ValueError, match=r"none of the 2 images .* can be used \(small\.png: too small"):
        make_shards(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="is not a folder"):
        make_shards(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match="scales"):
        PrepConfig(photos="x", out="y", scales=(2.0,))
    with pytest.raises(ValueError, match="variants = 0"):
        PrepConfig(photos="x", out="y", variants=0)


def test_other_library_versions_are_told(photos, tmp_path, capsys):
    out = make_shards(photos, tmp_path / "a")
    path = out / "shard-000001.json"
    manifest = json.loads(path.read_text())
    manifest["libraries"]["scipy"] = "0.1"
    path.write_text(json.dumps(manifest))
    make_shards(photos, out)
    assert "shard-000001.tar was made with other library versions (scipy 0.1 ->" in capsys.readouterr().out
    assert len(index(out)["libraries"]) == 2


def test_places_in_a_photo_depend_on_it_alone(photos, tmp_path):
    """Adding a photograph does not move the crops of the others."""
    few = {c.photo.name: (c.left, c.top) for c in plan_of(photos, tmp_path / "a", crops_per_photo=1).shards[0].crops}
    folder = tmp_path / "more"
    shutil.copytree(photos, folder)
    Image.fromarray(COFFEE[::-1]).save(folder / "aaa.png")
    more = {c.photo.name: (c.left, c.top) for c in plan_of(folder, tmp_path / "b", crops_per_photo=1).shards[0].crops}
    assert few.items() <= more.items() and len(more) == 4
