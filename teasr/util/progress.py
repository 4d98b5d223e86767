"""A progress line with phase, step, metrics, rate and time left.

It is redrawn in place on a terminal and printed every 10 s (by default) to a log file.
"""

from __future__ import annotations

import sys
import time


class ProgressLine:
    """Progress display: call `show(done, ...)` or `add(n)` after each unit of work, and `close()` once at the end.

    Prints nothing with `enabled=False` (ranks other than 0).
    """

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
        """Advance by `n` units (negative when work was lost)."""
        self.done += n
        self.show(self.done)

    def show(self, done: int, **numbers: float) -> None:
        """Print the line if it is due. `numbers` such as loss=0.5 are shown in the middle."""
        now = time.monotonic()
        if not self.enabled or (now - self.shown < self.every_s and done < self.total):
            return
        self.shown = now
        elapsed = max(1e-9, now - self.started)
        rate = (done - self.first) / elapsed
        left = (self.total - done) / rate if rate else float("inf")
        middle = "".join(f"  {name} {value:.4g}" for name, value in numbers.items())
        line = f"{self.phase:9s} {done}/{self.total} {self.unit}{middle}"
        if elapsed > 1 or done == self.total:  # earlier, the rate mostly measures the start of the workers
            line += f"  {rate:.3g} {self.unit}/s  {duration(left)} left"
        print(f"\r\033[K{line}" if self.terminal else line, end="" if self.terminal else "\n", flush=True)

    def close(self) -> None:
        """End the line."""
        if self.enabled and self.terminal and self.shown > 0:
            print(flush=True)


def duration(seconds: float) -> str:
    """Format seconds: 75 -> '1 min 15 s'."""
    if seconds == float("inf"):
        return "unknown time"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
