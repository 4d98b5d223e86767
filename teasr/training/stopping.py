"""Stop a run gracefully on SIGTERM, SIGINT or a time budget.

The current update is finished and saved. A second signal ends the process immediately.
"""

from __future__ import annotations

import signal
import threading
import time
from types import TracebackType

ECHO_S = 3.0  # seconds within which launchers may forward one Ctrl-C several times


class Stopping:
    """Context manager in which a first signal only sets `reason`.

    A second signal, more than ECHO_S seconds later, has its usual effect. `max_hours`: time budget from construction.
    """

    def __init__(self, max_hours: float | None = None):
        self.deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self.max_hours, self._signal, self._at, self._old = max_hours, None, 0.0, {}

    @property
    def reason(self) -> str | None:
        """Why the run should stop after this update, or None."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return f"train.max_hours = {self.max_hours:g}"
        return None

    def _handle(self, number: int, frame: object) -> None:
        if self._signal is None:
            self._signal, self._at = number, time.monotonic()
        elif time.monotonic() - self._at > ECHO_S:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers only there
            self._old = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()
