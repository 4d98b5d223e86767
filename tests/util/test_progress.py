"""Progress: a bar in a terminal, below all that is printed; lines in a log; an estimate without the slow beginning."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
import time

import pytest

from teasr.util import progress
from teasr.util.progress import ProgressLine


def screen(data: str) -> list[str]:
    """Return the rows that a terminal shows after this output."""
    rows, column = [""], 0
    for escape, text in re.findall(r"\x1b\[\d*(m|K)|(.|\n)", data, re.S):
        if escape == "K":
            rows[-1] = rows[-1][:column]
        elif text == "\r":
            column = 0
        elif text == "\n":
            rows.append("")
        elif text:
            rows[-1] = rows[-1][:column].ljust(column) + text + rows[-1][column + 1 :]
            column += 1
    return [row.rstrip() for row in rows]


def collect(terminal: int, found: list[bytes]) -> None:
    with contextlib.suppress(OSError):
        while data := os.read(terminal, 4096):
            found.append(data)


@pytest.fixture
def terminal(monkeypatch):
    """Redirect both streams to a terminal of a number of columns; what it returns reads all that was written."""
    with contextlib.ExitStack() as held:

        def begin(columns: int):
            ours, theirs = pty.openpty()
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            stream = held.enter_context(os.fdopen(theirs, "w", encoding="utf-8"))
            held.callback(os.close, ours)
            held.enter_context(contextlib.redirect_stdout(stream))
            held.enter_context(contextlib.redirect_stderr(stream))
            monkeypatch.setattr(sys, "__stdout__", stream)
            monkeypatch.setenv("TERM", "xterm")
            monkeypatch.delenv("COLUMNS", raising=False)
            found = []
            threading.Thread(target=collect, args=(ours, found), daemon=True).start()

            def read() -> str:
                print("\N{END OF TEXT}", end="", flush=True)
                while not b"".join(found).endswith(b"\x03"):
                    time.sleep(0.001)
                return b"".join(found).decode().removesuffix("\x03")

            return read

        yield begin


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `clock(seconds)` advances."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


@pytest.mark.parametrize("columns", [80, 40])
def test_the_bar_stays_below_what_is_printed_and_fits_the_terminal(terminal, clock, columns):
    read = terminal(columns)
    with ProgressLine("train", 100, "updates") as line:
        for i in range(60):
            clock(1)
            line.show(i + 1, loss=0.5)
            if i == 30:
                print("a note {of} one rank")
                print("a warning", file=sys.stderr)
    print("the end")
    rows = screen(read())
    assert rows[:2] == ["a note {of} one rank", "a warning"] and rows[3] == "the end"
    assert re.match(r"train [█▏▎▍▌▋▊▉]+ +60/100", rows[2]) and "40 s left" in rows[2] and len(rows[2]) < columns
    assert ("loss 0.5  1 updates/s" in rows[2]) == (columns == 80)


def test_colour_is_left_out_on_request(terminal, monkeypatch):
    read = terminal(80)
    with ProgressLine("train", 2, "updates") as line:
        line.show(1)
    coloured = read()
    assert "\x1b[32m" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    with ProgressLine("train", 2, "updates") as line:
        line.show(1)
    assert "\x1b[32m" not in read()[len(coloured) :]


def test_other_ranks_show_no_bar_but_print_below_none(terminal):
    read = terminal(80)
    print("half of a bar", end="")  # of rank 0
    with ProgressLine("train", 2, "updates", enabled=False) as line:
        line.show(1)
        print("rank 1: a note")
    assert screen(read()) == ["rank 1: a note", ""]


def test_errors_in_a_file_stay_as_they_are(terminal, tmp_path):
    terminal(80)
    with open(tmp_path / "log", "w") as log, contextlib.redirect_stderr(log), ProgressLine("train", 2, "updates"):
        print("a warning", file=sys.stderr)
    assert (tmp_path / "log").read_text() == "a warning\n"


def test_an_error_is_the_last_thing_on_the_screen(terminal):
    read = terminal(80)
    out = sys.stdout
    with pytest.raises(OSError), ProgressLine("prepare", 10, "samples") as line:
        line.add(3)
        print("begun without an end", end="")
        raise OSError
    assert sys.stdout is out
    print("error: the disk is full")
    rows = screen(read())
    assert rows[0] == "begun without an end" and "3/10 samples" in rows[1] and rows[2] == "error: the disk is full"


def test_a_transient_bar_vanishes(terminal):
    read = terminal(80)
    with ProgressLine("restore", 2, "pictures", transient=True) as line:
        line.show(0.5, "photo.png 50%")
        print("1/2 photo.png: done")
    data = read()
    assert "0/2 pictures  photo.png 50%" in data and screen(data) == ["1/2 photo.png: done", ""]


def test_the_first_estimate_leaves_out_the_slow_beginning(clock, capsys):
    with ProgressLine("train", 100, "updates", log_every_s=1) as line:
        for i, seconds in enumerate([30, 5, 2, *[1] * 20]):
            clock(seconds)
            line.show(i + 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train     1/100 updates" and " left" not in "".join(lines[:4])
    for text in lines[4:]:
        done = int(re.search(r"(\d+)/100", text)[1])
        minutes, seconds = divmod(100 - done, 60)
        assert text.endswith(
            f"1 updates/s  {f'{minutes} min ' if minutes else ''}{seconds:0{2 if minutes else 1}d} s left"
        )
    assert len(lines) == 23


def test_the_estimate_follows_a_change_of_speed(clock):
    rate = progress.Rate()
    for i in range(400):
        clock(1 if i < 100 else 2)
        rate.report(i + 1)
    assert rate.at(400) == pytest.approx(0.5) and len(rate.marks) < 110


def test_a_log_ends_with_the_time_it_took_and_shows_lost_work(clock, capsys):
    with ProgressLine("prepare", 100, "samples", done=20, log_every_s=10) as line:
        for n in (30, -10, 60):
            clock(8)
            line.add(n)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["prepare   50/100 samples", "prepare   100/100 samples  3.33 samples/s  in 24 s"]


def test_a_log_of_a_short_batch_has_no_line_of_its_own(clock, capsys):
    with ProgressLine("restore", 2, "pictures", transient=True) as line:
        for done in (0.5, 1, 1.5, 2):
            clock(4)
            line.show(done)
    assert capsys.readouterr().out == "restore   1/2 pictures\n"
