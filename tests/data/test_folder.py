"""data/prep/folder.py: one job for each part of a set, and a set or other files are replaced only when asked to."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT, make_shards
from PIL import Image
from test_making import COFFEE, command, config_of, run, set_hash

from teasr.data.prep.folder import claimed
from teasr.data.prep.job import make_set
from teasr.data.prep.making import settings_of
from teasr.data.shards import ShardSet


def part(rank):
    """The environment of one of two array jobs."""
    return os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"}


def test_a_second_job_on_the_same_part_is_refused_and_other_parts_are_not(photos, shards, tmp_path):
    out = tmp_path / "out"
    with claimed(out, settings_of(config_of(photos, out)), "making shards", 0, 2, False):
        code, _, error = run(photos, out, env={"RANK": "0", "WORLD_SIZE": "2"})
        assert code == 2 and f"{out} is in use by pid {os.getpid()} on host" in error and "part 0 of 2" in error
        code, _, error = run(photos, out, "seed=7", env={"RANK": "1", "WORLD_SIZE": "2"})
        assert code == 2 and f"{out} is in use with other settings by pid {os.getpid()}" in error
        jobs = [subprocess.Popen(command(photos, out), cwd=ROOT, env=part(1), stdout=subprocess.DEVNULL)]
        assert [job.wait() for job in jobs] == [0]
    assert run(photos, out)[0] == 0
    assert set_hash(out) == set_hash(shards) and not list(out.glob(".lock*"))


def test_two_parts_at_once_make_one_set(photos, shards, tmp_path):
    jobs = [
        subprocess.Popen(command(photos, tmp_path / "out"), cwd=ROOT, env=part(rank), stdout=subprocess.DEVNULL)
        for rank in (0, 1)
    ]
    assert [job.wait() for job in jobs] == [0, 0]
    assert set_hash(tmp_path / "out") == set_hash(shards)
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_other_settings_replace_a_set_only_when_asked_to(photos, tmp_path):
    out = make_shards(photos, tmp_path / "a")
    before = set_hash(out)
    code, _, error = run(photos, out, "crops_per_photo=4", "seed=3")
    assert code == 2 and error.splitlines()[-1] == (
        f"error: {out} holds a set of other settings (crops_per_photo: 16 -> 4; seed: 0 -> 3): choose another out=, "
        "delete the folder, or add --overwrite to replace what is there"
    )
    assert set_hash(out) == before and len(list(out.glob("*.tar"))) == 4
    assert run(photos, out, "crops_per_photo=4", "seed=3", "--overwrite")[0] == 0
    assert len(list(out.glob("*.tar"))) == 1 and len(ShardSet.open(str(out))) == 12


def test_an_unfinished_set_goes_on_only_with_its_own_settings(photos, shards, tmp_path):
    out = make_shards(photos, tmp_path / "a")
    (out / "index.json").unlink()
    (out / "shard-000002.json").unlink()
    with pytest.raises(ValueError, match=r"holds an unfinished set of other settings \(degradation: osediff -> none\)"):
        make_shards(photos, out, degradation="none")
    assert set_hash(make_shards(photos, out)) == set_hash(shards)


def test_a_job_that_finished_nothing_does_not_bind_the_folder(photos, tmp_path):
    with pytest.raises(ValueError, match="none of the 3 images"):
        make_shards(photos, tmp_path / "a", crop_px=1024)
    make_shards(photos, tmp_path / "a", crops_per_photo=1)


def test_other_photographs_replace_a_finished_set_only_when_asked_to(photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    out = make_shards(folder, tmp_path / "out", crops_per_photo=1)
    before = set_hash(out)
    Image.fromarray(COFFEE[::-1]).save(folder / "coffee.png")
    Image.fromarray(COFFEE[:, ::-1]).save(folder / "new.png")
    with pytest.raises(ValueError, match=r"holds a set of other photographs \(2 are new, 1 are gone\): choose another"):
        make_shards(folder, out, crops_per_photo=1)
    assert set_hash(out) == before
    make_set(config_of(folder, out, crops_per_photo=1), overwrite=True)
    assert len(ShardSet.open(str(out))) == 4


def test_a_folder_of_other_files_is_left_alone(photos, tmp_path):
    (tmp_path / "README.md").write_text("my notes")
    (tmp_path / "index.json").write_text('{"my": "data"}')
    with pytest.raises(ValueError, match=r"is not empty \(README.md, index.json\), and no set was begun in it"):
        make_shards(photos, tmp_path)
    assert (tmp_path / "README.md").read_text() == "my notes"
    make_set(config_of(photos, tmp_path), overwrite=True)
    assert len(ShardSet.open(str(tmp_path))) == 48
