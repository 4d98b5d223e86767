"""checks.py: problems that would end a run after hours are found before it starts."""

import logging
import shutil
from collections import namedtuple

import pytest
import torch

from teasr.training import engine
from teasr.training import preflight as checks

Usage = namedtuple("Usage", "total used free")


def test_a_run_folder_is_made_and_nothing_is_left_in_it(tmp_path):
    checks.writable(tmp_path / "a/b")
    assert list((tmp_path / "a/b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/run cannot be written"):
        checks.writable(tmp_path / "file/run")


@pytest.mark.parametrize(
    ("free", "lying", "warns"), [(10e9, 0, False), (7e9, 0, True), (3e9, 3, False), (2e9, 0, None)]
)
def test_room_for_checkpoints(tmp_path, monkeypatch, free, lying, warns):
    """Checkpoints of 2.5 GB: two kept, one being written and one best. Existing ones reduce the space still needed."""
    for i in range(lying):
        (tmp_path / f"checkpoints/step-{i:08d}").mkdir(parents=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, free))
    if warns is None:
        with pytest.raises(ValueError, match=r"takes 2\.50 GB and the disk of .* has 2\.00 GB free"):
            checks.room(tmp_path, int(2.5e9), keep=2)
        return
    warning = checks.room(tmp_path, int(2.5e9), keep=2)
    assert bool(warning) == warns and (not warns or "will take 10.00 GB more" in warning)


def test_bf16_needs_a_gpu_that_has_it(monkeypatch):
    checks.precision("bf16", None)  # slow on the CPU, but it works
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    checks.precision("fp32", None)
    with pytest.raises(ValueError, match="Tesla V100 does not support bf16"):
        checks.precision("fp32", "bf16")


def test_deepspeed_logs_errors_alone_unless_asked(monkeypatch):
    logger = logging.getLogger("DeepSpeed")
    records = [logger.makeRecord("DeepSpeed", level, "", 0, "text", (), None) for level in (20, 30, 40)]
    monkeypatch.delenv("TEASR_DEEPSPEED_LOG", raising=False)
    assert [bool(logger.filter(record)) for record in records] == [False, False, True]
    monkeypatch.setenv("TEASR_DEEPSPEED_LOG", "info")
    assert all(logger.filter(record) for record in records)
    monkeypatch.setenv("TEASR_DEEPSPEED_LOG", "loud")
    with pytest.raises(ValueError, match="TEASR_DEEPSPEED_LOG = loud: must be one of debug, info, warning, error"):
        engine.start_ranks(None, None)
