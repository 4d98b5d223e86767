"""output.py: printing never ends a program."""

import os
import sys

import pytest

from teasr.util.output import lenient_output


def test_a_full_disk_or_a_closed_pipe_costs_text_and_nothing_else(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    for stream in (open("/dev/full", "w"), open(writer, "w"), None):  # noqa: SIM115
        monkeypatch.setattr(sys, "stdout", stream)
        if stream:
            with pytest.raises(OSError, match=r"No space|Broken pipe"):
                print("lost", flush=True)
        with lenient_output():
            print("lost", flush=True)
            assert not sys.stdout.isatty()
        assert sys.stdout is stream
    monkeypatch.undo()
    with lenient_output():
        print("seen")
    assert capsys.readouterr().out == "seen\n"
