"""Progress with phase, count, metrics, rate and time left: a bar in a terminal, a line every 10 s in a log file."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

LEFT_OUT = 3  # reports before the clock of the rate starts: until then, workers, caches and kernels start too
SOONEST_S = 2.0  # seconds on that clock before the first estimate
BAR_COLUMNS = (8, 16)  # fewest and most


class Rate:
    """Units per second over the later half of the time so far. A slow beginning is soon left out."""

    def __init__(self):
        self.reports, self.marks = 0, deque()  # marks: (time, units done), the oldest one first
        self.began = 0.0

    def report(self, done: float) -> None:
        """Count the units that are done by now."""
        now = time.monotonic()
        self.reports += 1
        if self.reports <= LEFT_OUT:
            self.began, self.marks = now, deque([(now, done)])
            return
        elapsed = now - self.began
        if now - self.marks[-1][0] >= elapsed / 100:
            self.marks.append((now, done))
        while len(self.marks) > 1 and self.marks[1][0] <= now - elapsed / 2:
            self.marks.popleft()

    def at(self, done: float) -> float | None:
        """Return the rate, or None before it can be told."""
        now = time.monotonic()
        if self.reports <= LEFT_OUT or now - self.began < SOONEST_S:
            return None
        since, before = self.marks[0]
        return (done - before) / (now - since) if done > before and now > since else None


class ProgressLine:
    """Progress display: call `show(done, ...)` or `add(n)` after each unit of work, and `close()` once at the end.

    It is a context manager too. Lines that are printed meanwhile appear above the bar. enabled=False shows nothing
    (ranks other than 0). transient: the bar vanishes at the end, and a log has neither a first nor a last line.
    """

    def __init__(
        self,
        phase: str,
        total: int,
        unit: str,
        done: float = 0,
        enabled: bool = True,
        log_every_s: float = 10.0,
        transient: bool = False,
    ):
        self.phase, self.total, self.unit, self.transient = phase, total, unit, transient
        self.first, self.done, self.started, self.rate = done, done, time.monotonic(), Rate()
        terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.every_s = 0.2 if terminal else log_every_s
        self.enabled, self.bar, self.held = enabled, None, contextlib.ExitStack()
        self.shown = self.started if transient and not terminal else -float("inf")
        if terminal:
            self._start_bar()

    def _start_bar(self) -> None:
        out, redraw = sys.stdout, lambda: None
        if self.enabled:
            from tqdm import tqdm

            tqdm.monitor_interval = 0  # no thread beside a program that forks
            colour = None if "NO_COLOR" in os.environ else "green"
            how = {"ncols": 80, "nrows": 9, "bar_format": " ", "colour": colour, "leave": not self.transient}
            self.bar = tqdm(total=self.total, file=out, **how)
            redraw = self.bar.refresh
            self._draw()
        for stream, redirect in ((out, contextlib.redirect_stdout), (sys.stderr, contextlib.redirect_stderr)):
            if stream.isatty():
                above = _Above(stream, redraw)
                self.held.enter_context(redirect(above))
                self.held.callback(above.end)

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, n: int) -> None:
        """Advance by `n` units (negative when work was lost)."""
        self.show(self.done + n)

    def show(self, done: float, note: str = "", **numbers: float) -> None:
        """Draw the bar or print the line if it is due. `note` and numbers such as loss=0.5 are shown in the middle."""
        self.done = done
        self.rate.report(done)
        last = done >= self.total and not (self.transient and not self.bar)
        if not self.enabled or (time.monotonic() - self.shown < self.every_s and not last):
            return
        self.shown = time.monotonic()
        middle = [note] * bool(note) + [f"{name} {value:.4g}" for name, value in numbers.items()]
        if self.bar is not None:
            self._draw(middle)
        else:
            print(f"{self.phase:9s} {'  '.join([self._count(), *middle, *self._speed()])}", flush=True)

    def close(self) -> None:
        """Leave the bar as it is, or erase it if it is transient, and print elsewhere as before."""
        self.held.close()
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _count(self) -> str:
        return f"{int(self.done)}/{self.total} {self.unit}"

    def _speed(self) -> list[str]:
        """Return the rate and the time left, or at the end the mean rate and the time that it took."""
        if self.done >= self.total:
            seconds = max(1e-9, time.monotonic() - self.started)
            return [f"{(self.done - self.first) / seconds:.3g} {self.unit}/s", f"in {duration(seconds)}"]
        rate = self.rate.at(self.done)
        return [f"{rate:.3g} {self.unit}/s", f"{duration((self.total - self.done) / rate)} left"] if rate else []

    def _draw(self, middle: list[str] | None = None) -> None:
        """Draw the bar, in a narrow terminal with less text."""
        count, speed, middle = self._count(), self._speed(), middle or []
        self.bar.ncols = columns = shutil.get_terminal_size().columns - 1
        texts = ([count, *middle, *speed], [count, *middle, *speed[1:]], [count, *speed[1:]],
                 [count.split()[0], *speed[1:]])  # fmt: skip
        for text in map("  ".join, texts):
            room = columns - len(f"{self.phase}   {text}")
            if room >= BAR_COLUMNS[0]:
                break
        drawn = f"{{bar:{min(room, BAR_COLUMNS[1])}}} " if room >= BAR_COLUMNS[0] else ""
        text = text.replace("{", "{{").replace("}", "}}")
        self.bar.n, self.bar.bar_format = min(self.done, self.total), f"{self.phase} {drawn}{text}"
        self.bar.refresh()


class _Above:
    """A stream whose lines are written above the bar."""

    def __init__(self, stream: TextIO, redraw: Callable[[], object]):
        self._stream, self._redraw, self._begun = stream, redraw, ""

    def write(self, text: str) -> int:
        """Write the complete lines of `text`; what follows them waits for its end."""
        whole, newline, self._begun = (self._begun + text).rpartition("\n")
        if newline:
            self._stream.write(f"\r\033[K{whole}\n")
            self._stream.flush()
            self._redraw()
        return len(text)

    def end(self) -> None:
        """End a line that is not complete."""
        if self._begun:
            self.write("\n")

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def duration(seconds: float) -> str:
    """Format seconds: 75 -> '1 min 15 s'."""
    if seconds == float("inf"):
        return "unknown time"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
