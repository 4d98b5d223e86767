"""data/verifying.py and data_prep/verify_shards.py: intact sets pass, damage is reported with its remedy."""

import io
import json
import runpy
import shutil
import tarfile

import numpy as np
import pytest
from conftest import ROOT, make_shards
from PIL import Image

from teasr.data.prep.sheet import contact_sheet
from teasr.data.prep.verifying import read_index, verify_set
from teasr.imaging import images

KEY = "000000013"  # the second sample of shard-000001.tar


@pytest.fixture
def verify(capsys):
    main = runpy.run_path(str(ROOT / "data_prep/verify_shards.py"))["main"]

    def run(*arguments):
        code = main([*map(str, arguments), "--workers", "1"])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"hq_format": "webp-lossless", "variants": 2},
        {"hq_format": "jpeg98"},
        {"degradation": "realesrgan_usm"},
        {"peer_exact": True, "crops_per_photo": 2},
        {"degradation": "none", "layout": "grid", "crop_px": 128},
    ],
)
def test_good_sets_pass_and_lq_can_be_made_again(photos, tmp_path, verify, settings):
    out = make_shards(photos, tmp_path / "a", **settings)
    code, said, _ = verify(out, "--redo", 10)
    assert code == 0 and "no problems" in said
    assert json.loads((out / "index.json").read_text())["set_sha256"][:12] in said


def rewrite(path, change, order=None):
    with tarfile.open(path) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]
    members = [(name, change(name, data)) for name, data in members]
    with tarfile.open(path, "w") as tar:
        for name, data in order(members) if order else members:
            if data is not None:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def members(change):
    return lambda out: rewrite(out / "shard-000001.tar", change)


def flip(data, at=0.5):
    data = bytearray(data)
    data[int(len(data) * at)] ^= 1
    return bytes(data)


def tar(change):
    path = "shard-000001.tar"
    return lambda out: (out / path).write_bytes(change((out / path).read_bytes()))


def other_lq(name, data):
    return images.png_bytes(np.zeros((8, 8, 3), np.uint8)) if name == f"{KEY}.lq.png" else data


def manifest(out):
    path = out / "shard-000001.json"
    path.write_text(path.read_text().replace('"nsamples": 12', '"nsamples": 13'))


def index(change):
    def harm(out):
        data = json.loads((out / "index.json").read_text())
        change(data)
        (out / "index.json").write_text(json.dumps(data))

    return harm


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (lambda out: (out / "shard-000001.tar").unlink(), ["shard-000001.tar cannot be read (No such file"]),
        (lambda out: (out / "shard-000001.json").unlink(), ["its manifest shard-000001.json is missing"]),
        (manifest, ["its manifest shard-000001.json is missing or differs"]),
        (tar(lambda d: d[: len(d) // 2]), ["shard-000001.tar has", "cannot be read to its end"]),
        (tar(lambda d: b""), ["shard-000001.tar has 0 bytes", "cannot be read to its end"]),
        (tar(flip), ["shard-000001.tar is corrupted (its sha256 differs"]),
        (members(lambda n, d: None if n == f"{KEY}.lq.png" else d), [f"{KEY}.lq.png is missing"]),
        (members(lambda n, d: None if n.startswith(KEY) else d), [f"{KEY} is missing"]),
        (members(lambda n, d: b"{" if n == f"{KEY}.json" else d), [f"{KEY}.json is missing or broken"]),
        (
            members(lambda n, d: flip(d) if n == f"{KEY}.hq.png" else d),
            [f"{KEY}.hq.png is corrupted (its crc32 differs"],
        ),
        (members(other_lq), [f"{KEY}.lq.png is corrupted (its crc32 differs"]),
        (
            lambda out: rewrite(out / "shard-000001.tar", lambda n, d: d, lambda m: [*m, *m[:3]]),
            ["shard-000001.tar/000000012 appears twice"],
        ),
        (
            lambda out: rewrite(out / "shard-000001.tar", lambda n, d: d, lambda m: [*m[3:], *m[:3]]),
            ["shard-000001.tar: its samples are out of order"],
        ),
        (
            index(lambda data: data.update(set_sha256="0")),
            ["index.json: set_sha256 is not the hash of the listed shards"],
        ),
        (index(lambda data: data["shards"][1].update(nsamples=11)), ["its manifest shard-000001.json"]),
    ],
)
def test_damage_is_named_with_its_cure(photos, tmp_path, verify, harm, named):
    out = make_shards(photos, tmp_path / "a")
    harm(out)
    code, said, _ = verify(out)
    assert code == 1 and "no problems" not in said
    for text in named:
        assert text in said
    assert "`teasr prepare` command again" in said


def repack(out, change):
    """Rewrite a member and update all hashes, as a faulty writer would, so that hashes cannot reveal the damage."""
    import hashlib
    import zlib

    def patched(name, data):
        key, _, field = name.partition(".")
        if key == KEY and field == "json":
            record = json.loads(data)
            record["crc32"] = {f: zlib.crc32(change(f, d)) for f, d in fields.items() if f != "json"}
            return json.dumps(change("record", record)).encode()
        return change(field, data) if key == KEY else data

    path = out / "shard-000001.tar"
    with tarfile.open(path) as tar:
        fields = {i.name.partition(".")[2]: tar.extractfile(i).read() for i in tar if i.name.startswith(KEY)}
    rewrite(path, patched)
    data = json.loads((out / "index.json").read_text())
    row = data["shards"][1]
    row |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    data["set_sha256"] = hashlib.sha256("".join(r["sha256"] for r in data["shards"]).encode()).hexdigest()
    (out / "index.json").write_text(json.dumps(data))
    (out / "shard-000001.json").write_text(json.dumps(row))


def test_pictures_of_a_wrong_size_are_named(photos, tmp_path, verify):
    out = make_shards(photos, tmp_path / "a")
    small = images.png_bytes(np.zeros((8, 8, 3), np.uint8))
    repack(out, lambda field, data: small if field == "lq.png" else data)
    code, said, _ = verify(out)
    assert code == 1 and f"{KEY}.lq.png is 8x8 px, it must be 16x16" in said


def test_an_lq_that_is_not_made_of_its_hq_is_found_by_redoing(photos, tmp_path, verify):
    out = make_shards(photos, tmp_path / "a")
    wrong = images.png_bytes(np.full((16, 16, 3), 77, np.uint8))
    repack(out, lambda field, data: wrong if field == "lq.png" else data)
    assert verify(out)[0] == 0  # no other check can detect it
    code, said, _ = verify(out, "--redo", 48)
    assert code == 1 and f"{KEY}.lq.png is different when HQ is degraded again" in said


def test_a_share_decodes_some_samples_of_every_shard(photos, tmp_path, verify):
    out = make_shards(photos, tmp_path / "a")
    code, said, _ = verify(out, "--share", 0.25)
    assert code == 0 and "12/12 samples" in said


def test_strays_are_warnings(photos, tmp_path, verify):
    out = make_shards(photos, tmp_path / "a")
    shutil.copy(out / "shard-000000.tar", out / "shard-000099.tar")
    (out / ".shard-000000.tar.host-1.tmp").touch()
    code, said, _ = verify(out)
    assert code == 0 and said.count("warning:") == 2 and "shard-000099.tar does not belong" in said


def test_paired_sets_pass(tmp_path, verify):
    import skimage.data

    for name, size in (("HR", (600, 400)), ("LR", (150, 100))):
        (tmp_path / name).mkdir()
        Image.fromarray(skimage.data.coffee()).resize(size).save(tmp_path / name / "a.png")
    out = make_shards(tmp_path / "HR", tmp_path / "out", lq=str(tmp_path / "LR"))
    code, said, _ = verify(out, "--redo", 3)
    assert code == 0 and "--redo had no effect" in said


def test_the_contact_sheet_shows_pairs(shards, tmp_path, verify):
    assert verify(shards, "--sheet", tmp_path / "sheet.png")[0] == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (6 * 232, 4 * 396, 3)
    hq = sheet[4:196, 200:392].astype(float)
    lq = sheet[4:196, 4:196].astype(float)
    assert hq.std() > 5 and np.corrcoef(hq.mean(2).ravel(), lq.mean(2).ravel())[0, 1] > 0.3
    assert (sheet[198:232] < 100).any()  # captions
    assert np.array_equal(contact_sheet(shards, read_index(shards)), sheet)
    index = shards / "index.json"
    before = index.read_bytes()
    code, _, printed = verify(shards, "--sheet", index)
    assert code == 2 and "its name must end in .png" in printed and index.read_bytes() == before


def test_more_than_one_process_finds_the_same(photos, tmp_path):
    out = make_shards(photos, tmp_path / "a")
    (out / "shard-000002.tar").write_bytes(b"x")
    assert verify_set(out, 1.0, 4, 2)[0] == verify_set(out, 1.0, 4, 1)[0] != []


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda out: (out / "index.json").unlink(), "the set is not finished"),
        (lambda out: (out / "index.json").write_text("{"), "is broken"),
        (lambda out: (out / "index.json").write_text('{"format": 1}'), "has format 1"),
        (shutil.rmtree, "is not a folder"),
    ],
)
def test_nothing_to_check_is_a_mistake(photos, tmp_path, verify, harm, message):
    out = make_shards(photos, tmp_path / "a", crops_per_photo=1)
    harm(out)
    code, _, error = verify(out)
    assert code == 2 and message in error
    assert verify(out, "--share", "0")[0] == 2
    assert "local folder" in verify("s3://bucket/set")[2]
