"""Shard sets from strangers: nothing in them runs a command, leaves the folder, fills the memory or hangs the reader.

Each attack ends in an error, or in a skipped sample, that names what is wrong, both in training and in verifying.
"""

import io
import json
import os
import struct
import tarfile
import zlib
from itertools import islice

import numpy as np
import pytest
from conftest import make_shards
from PIL import Image
from test_verifying import KEY, repack, verify  # noqa: F401

from teasr.data.config import DataConfig
from teasr.data.latents import LatentCache
from teasr.data.layout import parse_index
from teasr.data.shards import ShardSet, read_shard, url_of
from teasr.data.stream import PairStream, batches
from teasr.imaging import images

X = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)


@pytest.fixture
def out(photos, tmp_path):
    return make_shards(photos, tmp_path / "set")


def edit_index(out, change):
    data = json.loads((out / "index.json").read_text())
    change(data)
    (out / "index.json").write_text(json.dumps(data))


def bad_samples(out, n=48):
    """The messages on the samples that training skips in one epoch."""
    shards = ShardSet.open(str(out))
    stream = PairStream(shards, DataConfig(str(out), max_bad_share=1.0), 0, 0, 1, 0)
    return [message for pair in islice(iter(stream), n) for message in pair.bad]


# the index


@pytest.mark.parametrize(
    "name", ["shard-000000.tar; touch PWNED", "$(touch PWNED)", "'; touch PWNED '", "x\ntouch PWNED"]
)
def test_a_shard_name_with_a_command_is_refused_and_nothing_runs(out, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    edit_index(out, lambda data: data["shards"][0].update(shard=name))
    for location in (str(out), f"pipe:cat {out}/{{name}}", f"file:{out}"):
        with pytest.raises(ValueError, match="is not a plain file name of letters"):
            ShardSet.open(location)
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("name", ["../secret.tar", "/etc/passwd", ".hidden.tar", "-rf.tar", "a/b.tar", "", "é.tar", 7])
def test_a_shard_lies_in_the_folder_of_its_set(out, verify, name):  # noqa: F811
    edit_index(out, lambda data: data["shards"][0].update(shard=name))
    with pytest.raises(ValueError, match="is not a plain file name of letters"):
        ShardSet.open(str(out))
    assert verify(out)[0] == 2


def test_names_are_quoted_in_commands_even_if_a_caller_passes_an_unchecked_one():
    assert url_of("pipe:cat /set/{name}", "a; b") == "pipe:cat /set/'a; b'"
    assert url_of("s3://bucket/set", "a; b") == "pipe:aws s3 cp 's3://bucket/set/a; b' -"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["shards"][0].update(nsamples=10**12), "shard-000000.tar has nsamples = 1000000000000"),
        (lambda d: d["shards"][0].update(nsamples=-1), "nsamples = -1: must be a whole number from 0"),
        (lambda d: d["shards"][0].update(nsamples="12"), "nsamples = '12'"),
        (lambda d: d["shards"][0].update(bytes=1e400), "bytes = inf"),
        (lambda d: d["shards"].append(d["shards"][0]), "lists shard-000000.tar twice"),
        (lambda d: d["shards"][0].pop("nsamples"), "KeyError"),
        (lambda d: d.update(shards=7), "TypeError"),
        (lambda d: d.update(settings=[]), "AttributeError"),
        (lambda d: d["settings"].update(scale="4; touch PWNED"), "scale = '4; touch PWNED'"),
        (lambda d: d["settings"].update(variants=0), "variants = 0"),
    ],
)
def test_an_index_of_nonsense_is_one_clear_error(out, verify, change, message):  # noqa: F811
    edit_index(out, change)
    with pytest.raises(ValueError, match=message):
        ShardSet.open(str(out))
    code, _, error = verify(out)
    assert code == 2 and error.count("\n") == 1


def test_json_of_a_thousand_brackets_is_an_error():
    with pytest.raises(ValueError, match="its content is not that of an index: RecursionError"):
        parse_index("[" * 100_000)


def test_a_set_of_latents_is_not_taken_for_images_nor_the_reverse(out, verify):  # noqa: F811
    with pytest.raises(ValueError, match="does not hold cached latents"):
        LatentCache.open((str(out),), ShardSet.open(str(out)), "none")
    edit_index(out, lambda d: d["settings"].update(codec_sha256="0", vae="x", augment="none"))
    assert "holds cached latents: give the folder of the shards" in verify(out)[2]


@pytest.mark.parametrize("name", ["index.json", "shard-000001.tar", "shard-000001.json"])
def test_a_named_pipe_in_place_of_a_file_does_not_hang(out, verify, name):  # noqa: F811
    (out / name).unlink()
    os.mkfifo(out / name)
    if name == "index.json":
        with pytest.raises(ValueError, match=r"index\.json is not a regular file"):
            ShardSet.open(str(out))
        assert verify(out)[0] == 2
    elif name == "shard-000001.json":
        assert "its manifest shard-000001.json is missing" in verify(out)[1]
    else:
        assert all("shard-000001.tar is not a regular file" in message for message in bad_samples(out))
        assert "shard-000001.tar cannot be read (special file: a named pipe)" in verify(out)[1]


def test_a_shard_that_claims_a_terabyte_is_not_read_into_memory(out, verify):  # noqa: F811
    with open(out / "shard-000001.tar", "r+b") as file:
        file.truncate(2**40)  # a sparse file, which takes no room on the disk
    code, said, _ = verify(out)
    assert code == 1 and "shard-000001.tar has 1099511627776 bytes" in said


# members


def with_member(out, field, **attributes):
    """Put a special member in place of one field of sample KEY."""
    path = out / "shard-000001.tar"
    with tarfile.open(path) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            if info.name == f"{KEY}.{field}":
                info = tarfile.TarInfo(info.name)
                for name, value in attributes.items():
                    setattr(info, name, value)
                data = b""
            tar.addfile(info, io.BytesIO(data) if data else None)


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [
        ("a symbolic link", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("a hard link", {"type": tarfile.LNKTYPE, "linkname": "nowhere"}),
        ("a folder", {"type": tarfile.DIRTYPE}),
        ("a device", {"type": tarfile.CHRTYPE}),
        ("a named pipe", {"type": tarfile.FIFOTYPE}),
        ("a sparse file", {"pax_headers": {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(2**40)}}),
    ],
)
def test_a_member_that_is_not_a_plain_file_is_named(out, verify, kind, attributes):  # noqa: F811
    with_member(out, "lq.png", **attributes)
    code, said, errors = verify(out)
    assert code == 1 and not errors
    assert f"shard-000001.tar/{KEY}.lq.png is {kind}, not a plain file: delete it and run the same" in said
    assert f"{KEY}.lq.png is missing" in said
    messages = bad_samples(out)
    assert len(messages) == 1 and f"{KEY}.lq.png is missing" in messages[0]


def test_a_member_that_declares_more_bytes_than_the_tar_has_is_an_error(out, verify):  # noqa: F811
    path = out / "shard-000001.tar"
    info = tarfile.TarInfo("000000012.hq.png")
    info.size = 2**40
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + path.read_bytes())
    assert verify(out)[0] == 1 and "shard-000001.tar cannot be read to its end" in verify(out)[1]
    messages = bad_samples(out)
    assert len(messages) == 12 and all("shard-000001.tar cannot be read" in message for message in messages)


def test_a_compressed_tar_is_refused_since_it_may_unpack_to_anything(out):
    import gzip

    path = out / "shard-000001.tar"
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match=r"shard-000001\.tar cannot be read"):
        read_shard(str(path))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width, height):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def saved(picture, kind="PNG", **how):
    file = io.BytesIO()
    picture.save(file, kind, **how)
    return file.getvalue()


def animated(kind):
    frames = [Image.fromarray(np.roll(X, i, 0)) for i in range(3)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:])


PICTURES = {
    "grey": (saved(Image.fromarray(X[..., 0])), "8-bit grey"),
    "alpha": (saved(Image.fromarray(np.dstack([X, X[..., :1]]))), "8-bit RGB with alpha"),
    "transparent colour": (saved(Image.fromarray(X), transparency=(1, 2, 3)), "8-bit RGB"),
    "palette": (saved(Image.fromarray(X).quantize(16)), "a palette"),
    "16 bit": (saved(Image.fromarray(X[..., 0].astype(np.uint16) * 257)), "16-bit grey"),
    "animated PNG": (animated("PNG"), "animated"),
    "animated WebP": (animated("WEBP"), "animated"),
    "another format": (saved(Image.fromarray(X), "TIFF"), "of another format"),
    "truncated": (images.png_bytes(X)[:2000], "truncated or damaged data"),
    "zero bytes": (b"", "damaged or of another format"),
    "a bomb of 1.6 gigapixels": (bomb(40_000, 40_000), "40000x40000 px"),
    "a size that OpenCV refuses": (bomb(1, 2**30), "1x1073741824 px"),
    "smaller": (images.png_bytes(X[:32, :32]), "32x32 px"),
    "larger": (images.png_bytes(np.tile(X, (2, 2, 1))), "128x128 px"),
    "not square": (images.png_bytes(X[:32]), "64x32 px"),
}


@pytest.mark.parametrize("what", PICTURES)
def test_a_picture_that_this_package_does_not_write_is_skipped_and_named(out, verify, what):  # noqa: F811
    """The hashes of sample and shard are right, as if another program had made the set."""
    data, message = PICTURES[what]
    repack(out, lambda field, old: data if field == "hq.png" else old)
    code, said, errors = verify(out)
    assert code == 1 and not errors and message in said and f"{KEY}.hq.png" in said
    messages = bad_samples(out)
    assert len(messages) == 1 and KEY in messages[0] and message in messages[0]


def test_an_lq_of_another_scale_is_skipped_and_named(out):
    repack(out, lambda field, old: images.png_bytes(X[:32, :32]) if field == "lq.png" else old)
    messages = bad_samples(out)
    assert len(messages) == 1 and "HQ has 64x64 px and LQ 32x32 px, but in" in messages[0]


def test_one_sample_of_another_size_does_not_stop_a_run(out):
    repack(out, lambda field, old: images.png_bytes(np.tile(X, (2, 2, 1))) if field == "hq.png" else old)
    stream = PairStream(ShardSet.open(str(out)), DataConfig(str(out)), 0, 0, 1, 0)
    assert sum(len(names) for _, names in islice(batches(stream, 4), 12)) == 1


@pytest.mark.parametrize("record", ["[]", "[" * 100_000, '{"crc32": 7}', '{"crc32": {"lq.png": "x"}}', "\x00"])
def test_a_record_of_nonsense_is_named(out, verify, record):  # noqa: F811
    path = out / "shard-000001.tar"
    with tarfile.open(path) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            data = record.encode() if info.name == f"{KEY}.json" else data
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    code, said, errors = verify(out, "--redo", "48")
    assert code == 1 and not errors and KEY in said
