"""util/files.py: atomic writes under any valid name, temporary files that are recognised, and special files."""

import os

import pytest

from teasr.util import files


@pytest.mark.parametrize("name", ["x" * 244, "x" * 255, "é" * 127, "写" * 85, "." * 250, "a\nb" * 80, "x.png"])
def test_every_name_that_the_file_system_takes_can_be_written(tmp_path, name):
    files.write_atomic(tmp_path / name, b"content")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [(name, b"content")]


@pytest.mark.parametrize("name", ["x" * 255, "写" * 85, "a\nb" * 80, "x.y.z-1.png"])
def test_a_temporary_file_of_any_name_is_removed_when_its_process_is_dead(tmp_path, monkeypatch, name):
    monkeypatch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), 9))
    child = os.fork()
    if not child:
        files.write_atomic(tmp_path / name, b"half")
    os.waitpid(child, 0)
    assert len(list(tmp_path.glob(".*.tmp"))) == 1
    files.remove_strays(tmp_path)
    assert not list(tmp_path.iterdir())


def test_temporary_files_of_living_processes_and_other_machines_stay(tmp_path):
    names = [f".a.png.{files._host()}-{os.getpid()}-0a1b.tmp", f".b.png.{files._host()}-{os.getpid()}.tmp"]
    names += [".c.png.elsewhere-99999999-0a1b.tmp"]
    for name in names:
        (tmp_path / name).touch()
    files.remove_strays(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)


def test_a_link_in_place_of_the_result_is_replaced_and_its_target_is_not_written_to(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out").symlink_to("precious")
    files.write_atomic(tmp_path / "out", b"new")
    assert (tmp_path / "precious").read_text() == "mine" and (tmp_path / "out").read_bytes() == b"new"


def test_unusual_files_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    found = {name: files.unusual(tmp_path / name) for name in ("pipe", "loop", "nowhere", ".", "/dev/zero", "a\0b")}
    assert list(found.values()) == [
        "special file: a named pipe", "file cannot be read: Too many levels of symbolic links",
        "file cannot be read: No such file or directory", "special file: a folder", "special file: a device",
        "file cannot be read: embedded null byte",
    ]  # fmt: skip
    assert files.unusual(tmp_path / "file") == files.unusual(tmp_path / "link") == ""
