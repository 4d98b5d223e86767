"""Printing that cannot end a program: a log file on a full disk or a closed pipe loses text, and nothing else."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO


class Lenient:
    """A text stream whose text is dropped while it cannot be written."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text` if that is possible; returns its length."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream if that is possible."""
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextlib.contextmanager
def lenient_output() -> Iterator[None]:
    """Context manager in which a failing write to standard output or standard error is not an error."""
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))  # Python has no stream if it was started with >&-
        stack.enter_context(contextlib.redirect_stdout(Lenient(sys.stdout or nowhere)))
        stack.enter_context(contextlib.redirect_stderr(Lenient(sys.stderr or nowhere)))
        yield
