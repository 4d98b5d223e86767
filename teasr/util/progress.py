"""One progress line: phase, step, what matters now, rate and time left; redrawn on a terminal, sparse in a log file."""

from __future__ import annotations

import sys
import time


class ProgressLine:
    """`show(done, ...)` or `add(n)` after each unit of work; `close()` once. Silent with `enabled=False` (ranks other than 0)."""

    def __init__(
        self, phase: str, total: int, unit: str, done: int = 0, enabled: bool = True, log_every_s: float = 10.0
    ):
        self.phase, self.total, self.unit, self.enabled = phase, total, unit, enabled
        self.first, self.started = done, time.monotonic()
        self.terminal = sys.stdout.isatty()
        self.every_s = 0.2 if self.terminal else log_every_s
        self.shown = -float("inf")
        self.done = done

    def add(self, n: int) -> None:
        """`n` more units are through (fewer, when work was lost)."""
        self.done += n
        self.show(self.done)

    def show(self, done: int, **numbers: float) -> None:
        """Draw the line if it is due; `numbers` such as loss=0.5 are put in the middle."""
        now = time.monotonic()
        if not self.enabled or (now - self.shown < self.every_s and done < self.total):
            return
        self.shown = now
        elapsed = max(1e-9, now - self.started)
        rate = (done - self.first) / elapsed
        left = (self.total - done) / rate if rate else float("inf")
        middle = "".join(f"  {name} {value:.4g}" for name, value in numbers.items())
        line = f"{self.phase:9s} {done}/{self.total} {self.unit}{middle}"
        if elapsed > 1 or done == self.total:  # before that it is mostly the start of the workers
            line += f"  {rate:.3g} {self.unit}/s  {duration(left)} left"
        print(f"\r\033[K{line}" if self.terminal else line, end="" if self.terminal else "\n", flush=True)

    def close(self) -> None:
        """End the line."""
        if self.enabled and self.terminal and self.shown > 0:
            print(flush=True)


def duration(seconds: float) -> str:
    """75 -> '1 min 15 s'."""
    if seconds == float("inf"):
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
