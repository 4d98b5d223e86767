"""Say in one line why a training ended when a library reports it with an exception of its own."""

from __future__ import annotations

import contextlib
import signal
import threading

import torch

# parts of the error messages of PyTorch
LOST = ("gloo", "NCCL", "Connection reset by peer", "Connection closed by peer")  # when another rank has died
LOADER = "DataLoader worker"
MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def explained(error: Exception, ranks: int, saved: int) -> Exception | None:
    """Return an error that explains `error` to the user, or None if the run cannot explain it.

    `ranks`: number of ranks. `saved`: the update from which the run resumes.
    """
    text, resume = _one_line(error), f"run the same command to resume from update {saved}"
    # the pipe to the process may break before PyTorch notes its end; broken connections of ranks are RuntimeErrors
    if (LOADER in text and isinstance(error, RuntimeError)) or isinstance(error, ConnectionError | EOFError):
        return ChildProcessError(
            f"a process that reads the training data has died ({text}): most often it was killed for lack of memory "
            f"(see dmesg), then lower data.workers; {resume}"
        )
    if LOADER in text and isinstance(error, ValueError):  # its message ends with that of the process, after a traceback
        return ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: "))
    if ranks > 1 and any(name in text for name in LOST):
        return ConnectionError(f"another rank is gone ({text}): the reason is in its own log; {resume}")
    return out_of_memory(error, resume)


def ignore_children() -> None:
    """Ignore the end of child processes from now on, so that closing a run is not interrupted.

    PyTorch's handler raises an error about a dead loader process in whatever code runs when the signal arrives.
    """
    if threading.current_thread() is threading.main_thread():  # Python sets handlers only there
        for _ in range(2):  # the first call may run the old handler for a signal that has arrived
            with contextlib.suppress(RuntimeError):
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def out_of_memory(error: Exception, then: str = "then run the same command again") -> OSError | None:
    """Return an error that says what to do when `error` means that memory ran out, else None."""
    if not isinstance(error, MemoryError | RuntimeError):
        return None
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(t in str(error) for t in MEMORY):
        return None
    return OSError(
        f"the memory is not sufficient ({_one_line(error)}): `teasr train --dry-run` shows what takes it, and "
        f"docs/troubleshooting.md lists the settings that need less; {then}"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__
