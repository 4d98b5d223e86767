"""checkpoint.py, files.py and tracking.py: atomic writes, fallback to the newest intact checkpoint, and logging.

The CSV file survives an interruption, and MLflow cannot stop a run.
"""

import os
import shutil

import pytest
import torch

from teasr.training import checkpoint
from teasr.util import checkpoint_folder
from teasr.util.files import write_atomic


def save(root, update, text="x", keep=2):
    writer = checkpoint.Writer(root, update)
    (writer.temporary / "sub").mkdir()
    writer.text("sub/file", text)
    writer.tensors("weights.safetensors", {"a": torch.arange(update)})
    writer.commit(keep)
    assert writer.problem is None
    return root / checkpoint_folder.name_of(update)


def test_newest_complete_one_wins_and_old_ones_go(tmp_path, capsys):
    for update in (1, 2, 3):
        save(tmp_path, update)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    assert checkpoint_folder.latest(tmp_path).name == "step-00000003"
    (tmp_path / "step-00000003/sub/file").write_text("y")
    assert checkpoint_folder.latest(tmp_path).name == "step-00000002"
    assert "step-00000003 is damaged (sub/file has changed)" in capsys.readouterr().out
    (tmp_path / "step-00000002/sub/file").unlink()
    assert checkpoint_folder.latest(tmp_path) is None


def test_an_interrupted_save_does_not_count(tmp_path):
    good = save(tmp_path, 1)
    checkpoint.Writer(tmp_path, 2).text("half", "x")
    assert checkpoint_folder.latest(tmp_path) == good
    save(tmp_path, 3)
    assert not list(tmp_path.glob(".tmp-*"))


def names(root):
    return sorted(p.name for p in root.iterdir())


def test_an_unproven_checkpoint_does_not_evict_the_newest_proven_one(tmp_path):
    """A checkpoint is proven when a finite update followed it; a run that diverges after each save proves none."""
    save(tmp_path, 1, keep=1)
    checkpoint.prove(tmp_path, 1, keep=1)
    for update in (2, 3):
        save(tmp_path, update, keep=1)
        assert names(tmp_path) == ["proven", "step-00000001", f"step-0000000{update}"]
    checkpoint.prove(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["proven", "step-00000003"] and checkpoint.proven(tmp_path).name == "step-00000003"
    shutil.rmtree(tmp_path / "step-00000003")
    assert checkpoint.proven(tmp_path) is None


def test_damaged_checkpoints_and_copies_are_neither_counted_nor_removed(tmp_path):
    for update in (1, 2):
        save(tmp_path, update)
    (tmp_path / "step-00000002/sub/file").unlink()
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000001-copy")
    for update in (3, 4):
        save(tmp_path, update)
    assert names(tmp_path) == ["step-00000001-copy", "step-00000002", "step-00000003", "step-00000004"]
    assert checkpoint_folder.set_aside(tmp_path / "step-00000002", "damaged").name == "damaged-step-00000002"
    (tmp_path / "step-00000002").mkdir()
    assert checkpoint_folder.set_aside(tmp_path / "step-00000002", "damaged").name == "damaged-step-00000002-2"
    for text in ("[]", "{}", "{", '{"a": 1}', '{"a": [1, "?"]}'):
        (tmp_path / "step-00000004/MANIFEST.json").write_text(text)
        assert checkpoint_folder.latest(tmp_path).name == "step-00000003", text


def test_files_have_the_permissions_of_the_umask(tmp_path):
    """safetensors makes files that only their owner can read, which colleagues cannot restore with."""
    old = os.umask(0o027)
    try:
        folder = save(tmp_path, 1)
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o640}


def test_resolve_takes_runs_and_checkpoints(tmp_path):
    folder = save(tmp_path / "checkpoints", 7)
    assert checkpoint_folder.resolve(tmp_path) == checkpoint_folder.resolve(folder) == folder
    with pytest.raises(ValueError, match="neither a checkpoint nor a run folder"):
        checkpoint_folder.resolve(tmp_path / "nowhere")
    (folder / "sub/file").write_text("?")
    with pytest.raises(ValueError, match="damaged"):
        checkpoint_folder.resolve(folder)
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        checkpoint_folder.resolve(tmp_path)


def test_write_atomic_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
