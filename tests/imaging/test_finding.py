"""imaging/finding.py and what its users make of it: special files, links in circles, files reached twice, odd names."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, make_shards
from PIL import Image

from teasr import cli
from teasr.data import pairs
from teasr.imaging import finding
from teasr.restore import batch

PICTURE = np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8)


@pytest.fixture
def trap(tmp_path):
    """A folder with two good pictures and everything that hung or killed a program before."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        Image.fromarray(PICTURE).save(folder / name)
    os.mkfifo(folder / "pipe.png")
    (folder / "itself.png").symlink_to("itself.png")
    (folder / "circle.png").symlink_to("elcric.png")
    (folder / "elcric.png").symlink_to("circle.png")
    (folder / "0_again.png").symlink_to("sub/b.png")
    (folder / "sub/up").symlink_to("..")
    (folder / "nowhere.png").symlink_to("missing")
    with open(folder / "huge.png", "wb") as file:
        file.truncate(2**40)
    with open(os.fsencode(folder) + b"/latin-1 \xe9.png", "wb") as file:
        file.write((folder / "a.png").read_bytes())
    return folder


LEFT_OUT = {
    "0_again.png": "duplicate: a link to sub/b.png",
    "circle.png": "file cannot be read: Too many levels of symbolic links",
    "elcric.png": "file cannot be read: Too many levels of symbolic links",
    "huge.png": "too large: more than 1.8 GB",
    "itself.png": "file cannot be read: Too many levels of symbolic links",
    "latin-1 \\udce9.png": "name is not valid UTF-8: rename it",
    "nowhere.png": "file cannot be read: No such file or directory",
    "pipe.png": "special file: a named pipe",
    "sub/up": "link to a folder: not followed; give the linked folder itself",
}


def test_the_walk_lists_what_can_be_read_and_names_the_rest(trap):
    names, left_out = finding.walk_pictures(trap)
    assert names == ["a.png", "sub/b.png"] and dict(left_out) == LEFT_OUT and len(left_out) == len(LEFT_OUT)


def test_upscaling_a_folder_of_traps_restores_the_pictures_and_names_the_rest(untrained, trap, tmp_path, capsys):
    code = cli.main(["upscale", str(trap), "-o", str(tmp_path / "out"), "--model", str(untrained)])
    said, errors = capsys.readouterr()
    assert code == 1 and "Traceback" not in errors and "7 of 11 images failed" in errors
    for name, reason in LEFT_OUT.items():
        assert f"{trap}/{name}: skipped: {reason}" in said
    made = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png"))
    assert made == ["a.png", "sub/b.png"]


def test_what_loses_no_picture_is_no_failure(untrained, trap, tmp_path, capsys):
    for name in LEFT_OUT.keys() - {"0_again.png", "sub/up"}:
        path = trap / name.replace("\\udce9", "\udce9")
        path.unlink()
    assert cli.main(["upscale", str(trap), "-o", str(tmp_path / "out"), "--model", str(untrained)]) == 0
    assert "skipped: duplicate: a link to sub/b.png" in capsys.readouterr().out


def test_shards_are_made_of_the_pictures_and_the_rest_is_counted_with_its_reason(photos, trap, tmp_path):
    shutil.copytree(photos, trap, dirs_exist_ok=True)
    command = [sys.executable, "data_prep/make_shards.py", f"photos={trap}", f"out={tmp_path / 'out'}", "crop_px=64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "from 3 photos" in done.stdout and "skipped 1: special file" in done.stdout
    assert "skipped 4: file cannot be read" in done.stdout


def test_scores_of_a_folder_with_a_trap_are_refused(trap):
    with pytest.raises(ValueError, match=r"circle\.png cannot be used \(file cannot be read: Too many levels"):
        pairs.from_folders(trap, None)


def test_a_pattern_does_not_follow_links_in_circles(trap):
    (trap / "sub/up2").symlink_to("..")  # two circles: 2 ** 40 paths
    found = batch.jobs([f"{trap}/**/*.png"], trap / "out")
    assert [job.source.name for job in found if not job.problem] == ["a.png", "b.png"]
    assert len(batch.jobs([f"{trap}/**"], trap / "out")) == len(found)


def test_a_file_that_is_given_twice_is_restored_once(trap):
    twice = [str(trap), str(trap / "a.png"), str(trap / "sub/../a.png"), str(trap / "0_again.png")]
    found = batch.jobs(twice, trap / "out")
    assert [job.source.name for job in found if not job.problem] == ["a.png", "b.png"]
    assert sum(job.problem == f"duplicate: the same file as {trap / 'a.png'}" for job in found) == 2


def test_an_input_of_traps_alone_is_an_error_that_names_the_first(trap):
    for name in ("pipe.png", "itself.png"):
        with pytest.raises(ValueError, match=rf"{name} is not an image, .*\(.*{name}: {LEFT_OUT[name]}"):
            batch.jobs([str(trap / name)], trap / "out")


def test_pictures_with_names_of_244_characters_are_restored(untrained, tmp_path):
    (tmp_path / "in").mkdir()
    for length in (244, 251):
        Image.fromarray(PICTURE).save(tmp_path / "in" / ("x" * (length - 4) + ".png"))
    command = ["upscale", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--model", str(untrained)]
    assert cli.main(command) == 0 and len(list((tmp_path / "out").iterdir())) == 2


def test_a_set_of_photographs_with_names_of_244_characters(photos, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(photos / "coffee.png", tmp_path / "in" / ("x" * 240 + ".png"))
    make_shards(tmp_path / "in", tmp_path / "out", crops_per_photo=1)
