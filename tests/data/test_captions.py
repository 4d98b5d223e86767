"""Captions: text files beside photographs, in the shards, embedded once, and read with the samples in training."""

import json
import shutil

import pytest
import torch
from conftest import make_shards
from test_shards import rewrite

from teasr.data.captions import MEMBER, CaptionCache, caption_key
from teasr.data.config import DataConfig
from teasr.data.prep.captions import CaptionsConfig, cache_captions
from teasr.data.prep.verifying import verify_set
from teasr.data.shards import ShardSet, read_shard
from teasr.data.stream import PairStream, batches, caption_cache

CAPTIONS = {"coffee": "a cup of coffee on a table", "chelsea": "a cat", "rocket": "a rocket"}
SMALL = {"crops_per_photo": 4, "shard_samples": 4, "captions": "files"}


def embed(text):
    """A row of numbers for each word: embeddings of different lengths, which tell the captions apart."""
    return torch.tensor([[len(word), *map(float, word.encode()[:2].ljust(2))] for word in text.split()])


def alike(text):
    """The same with five rows for every caption, as encoders with padding give."""
    return torch.cat((embed(text), torch.zeros(5, 3)))[:5]


@pytest.fixture(scope="module")
def told(photos, tmp_path_factory):
    """The photographs with text files beside them."""
    folder = tmp_path_factory.mktemp("told")
    for path in photos.iterdir():
        shutil.copyfile(path, folder / path.name)
        (folder / path.name).with_suffix(".txt").write_text(f"  {CAPTIONS[path.stem]}\n", encoding="utf-8-sig")
    return folder


@pytest.fixture(scope="module")
def captioned(told, tmp_path_factory):
    """A shard set with captions: 12 samples in 3 shards."""
    return make_shards(told, tmp_path_factory.mktemp("captioned"), **SMALL)


@pytest.fixture(scope="module")
def cached(captioned, tmp_path_factory):
    """Its embeddings, which differ in length."""
    out = tmp_path_factory.mktemp("embeddings")
    cache_captions(CaptionsConfig(str(captioned), "model", str(out)), embed)
    return out


def test_every_sample_has_the_caption_of_its_photograph(captioned):
    for path in sorted(captioned.glob("*.tar")):
        for raw in read_shard(str(path)):
            record = json.loads(raw["json"])
            assert raw["txt"].decode() == CAPTIONS[record["source"].split(".")[0]]
    assert verify_set(captioned, 1.0, 2, 1)[:2] == ([], [])


def test_a_changed_or_missing_caption_is_found(captioned, tmp_path):
    shutil.copytree(captioned, tmp_path / "set")
    rewrite(tmp_path / "set/shard-000000.tar", lambda name, data: b"a dog" if name == "000000001.txt" else data)
    rewrite(tmp_path / "set/shard-000001.tar", lambda name, data: None if name == "000000005.txt" else data)
    problems = "\n".join(verify_set(tmp_path / "set", 1.0, 0, 1)[0])
    assert "000000001.txt is corrupted" in problems and "000000005.txt is missing" in problems


def test_photographs_without_a_caption_are_an_error_or_get_the_default(told, tmp_path):
    shutil.copytree(told, tmp_path / "photos")
    (tmp_path / "photos/chelsea.txt").write_text(" \n")
    with pytest.raises(
        ValueError, match=r"1 of 3 photographs have no caption, the first is chelsea.png: write it into"
    ):
        make_shards(tmp_path / "photos", tmp_path / "set", **SMALL)
    (tmp_path / "photos/chelsea.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"chelsea.txt cannot be read .* write it as UTF-8 text"):
        make_shards(tmp_path / "photos", tmp_path / "set", **SMALL)
    (tmp_path / "photos/chelsea.txt").unlink()
    out = make_shards(tmp_path / "photos", tmp_path / "set", **SMALL, caption_default="a photograph")
    found = {raw["txt"].decode() for path in out.glob("*.tar") for raw in read_shard(str(path))}
    assert found == {"a photograph", CAPTIONS["coffee"], CAPTIONS["rocket"]}
    with pytest.raises(ValueError, match="caption_default = 'x' has no effect without captions"):
        make_shards(told, tmp_path / "other", caption_default="x")


def test_other_captions_make_another_set_and_none_leave_the_old_bytes(told, photos, shards, tmp_path):
    shutil.copytree(told, tmp_path / "photos")
    make_shards(tmp_path / "photos", tmp_path / "set", **SMALL)
    (tmp_path / "photos/chelsea.txt").write_text("a tiger")
    with pytest.raises(ValueError, match="holds a set with other captions of these photographs: choose another out="):
        make_shards(tmp_path / "photos", tmp_path / "set", **SMALL)
    for path in (tmp_path / "photos").glob("*.txt"):
        path.write_text("not read")
    make_shards(tmp_path / "photos", tmp_path / "plain")
    assert (tmp_path / "plain/shard-000000.tar").read_bytes() == (shards / "shard-000000.tar").read_bytes()


def test_each_caption_is_embedded_once_a_shard_with_the_suffix(captioned, tmp_path, capsys):
    asked = []
    config = CaptionsConfig(str(captioned), "model", str(tmp_path), suffix=", sharp")
    cache_captions(config, lambda text: asked.append(text) or embed(text))
    wanted = [{raw["txt"].decode() for raw in read_shard(str(path))} for path in sorted(captioned.glob("*.tar"))]
    assert len(asked) == sum(map(len, wanted)) and set(asked) == {f"{caption}, sharp" for caption in set.union(*wanted)}
    assert f"set data.captions={tmp_path}" in capsys.readouterr().out
    cache_captions(config, None)  # nothing is left to do


def test_the_embeddings_arrive_with_their_samples_in_order_and_after_a_resume(captioned, cached):
    """Also in loader processes, and for samples whose embeddings have different lengths."""

    def read(first, workers=0):
        config = DataConfig(str(captioned), captions=str(cached), streams=2, workers=workers)
        return batches(PairStream(ShardSet.open(str(captioned)), config, 0, 0, 1, first), 4)

    stored = {raw["__key__"]: raw["txt"] for path in captioned.glob("*.tar") for raw in read_shard(str(path))}
    seen = [next(batch)[0] for batch in [read(0, workers=2)] for _ in range(3)]
    for batch in seen:
        assert isinstance(batch.text, tuple)
        for key, text in zip(batch.keys, batch.text, strict=True):
            assert torch.equal(text[0], embed(stored[key].decode()))
    resumed, _ = next(read(8))
    assert resumed.keys == seen[2].keys
    assert all(torch.equal(a, b) for a, b in zip(resumed.text, seen[2].text, strict=True))
    assert len(resumed.rows(slice(1, 3)).text) == 2


def test_embeddings_of_one_length_become_one_tensor(captioned, tmp_path):
    cache_captions(CaptionsConfig(str(captioned), "model", str(tmp_path)), alike)
    config = DataConfig(str(captioned), captions=str(tmp_path), streams=1)
    batch, _ = next(batches(PairStream(ShardSet.open(str(captioned)), config, 0, 0, 1, 0), 2))
    assert isinstance(batch.text, torch.Tensor) and batch.text.shape == (2, 5, 3)


def test_embeddings_that_do_not_fit_are_an_error_with_the_cure(captioned, cached, told, shards, tmp_path):
    def opened(location, source=captioned):
        return caption_cache(ShardSet.open(str(source)), DataConfig(str(source), captions=str(location)))

    assert opened(cached).width == 3
    other = make_shards(told, tmp_path / "other", **SMALL, seed=3)
    for location, source, message in (
        (tmp_path / "nowhere", captioned, "holds no index.json: make it with `teasr cache-captions shards="),
        (captioned, captioned, "does not hold embeddings of captions"),
        (cached, other, r"was made from other shards than those in .*other \(shard-000000.tar differs\)"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(location, source)
    with pytest.raises(ValueError, match=r"has no captions: make the set with `teasr prepare .. captions=files`"):
        cache_captions(CaptionsConfig(str(shards), "model", str(tmp_path / "out")), embed)
    cache_captions(CaptionsConfig(str(other), "model", str(tmp_path / "text"), suffix=", 8k"), embed)
    names = (str(captioned), str(other))
    with pytest.raises(ValueError, match=r"have suffix = '', those in .* ', 8k': run `teasr cache-captions` again"):
        CaptionCache.open((str(cached), str(tmp_path / "text")), ShardSet.open(*names))
    with pytest.raises(ValueError, match="holds a set of other settings"):
        cache_captions(CaptionsConfig(str(captioned), "other model", str(cached)), embed)


def test_a_damaged_or_missing_embedding_is_named_and_the_sample_replaced(captioned, cached, tmp_path):
    shutil.copytree(cached, tmp_path / "text")
    key = caption_key(CAPTIONS["chelsea"].encode())
    for path in (tmp_path / "text").glob("*.tar"):
        rewrite(path, lambda name, data: None if name == f"{key}.{MEMBER}" else data)
    config = DataConfig(str(captioned), captions=str(tmp_path / "text"), streams=1)
    read = iter(PairStream(ShardSet.open(str(captioned)), config, 0, 0, 1, 0))
    pairs = [next(read) for _ in range(12)]
    bad = [message for pair in pairs for message in pair.bad]
    assert bad and all(f"{key}.{MEMBER} is missing: run `teasr cache-captions` again" in text for text in bad)
    assert all(not torch.equal(pair.text, embed(CAPTIONS["chelsea"])) for pair in pairs)
