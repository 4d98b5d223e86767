"""Large arrays in temporary files instead of memory, so that memory does not limit the size of a picture."""

from __future__ import annotations

import errno
import math
import mmap
import os
import shutil
import tempfile
import weakref
from pathlib import Path

import numpy as np

LARGE = 2**26  # bytes: smaller arrays stay in memory


class Scratch:
    """Creates arrays: small ones in memory, those of at least `LARGE` bytes in temporary files of a folder.

    The files are nameless, so nothing is left of them when the process ends, however it ends. Their pages count as this
    process's memory only until `release` is called: call it after every part of a large array that was read or written.
    """

    def __init__(self, folder: Path | None = None):
        """folder: without one, all arrays stay in memory."""
        self.folder = folder
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
        """Return an array of zeros. Its file is deleted with it. Raises OSError if the folder cannot hold it."""
        if self.in_memory(shape, np.dtype(dtype).itemsize):
            return np.zeros(shape, dtype)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        self.require(size)
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)  # without it, a full disk would kill the process later
                memory = mmap.mmap(file.fileno(), size)
        except OSError as error:
            text = f"{error.strerror} (temporary file of {size / 1e9:.1f} GB)"
            raise OSError(error.errno, text, str(self.folder)) from None
        self._maps.add(memory)
        return np.frombuffer(memory, dtype).reshape(shape)

    def in_memory(self, shape: tuple[int, ...], item_bytes: int) -> bool:
        """Whether an array of this shape would lie in memory."""
        return self.folder is None or math.prod(shape) * item_bytes < LARGE

    def require(self, size: int) -> None:
        """Raise OSError unless the disk has room for `size` bytes of temporary files."""
        if self.folder is None or size < LARGE:
            return
        free = shutil.disk_usage(self.folder).free
        if free < size:
            text = f"temporary files of {size / 1e9:.1f} GB do not fit on the disk, which has {free / 1e9:.1f} GB free"
            raise OSError(errno.ENOSPC, text, str(self.folder))

    def release(self) -> None:
        """Return the memory that holds parts of the files; their contents stay."""
        for memory in self._maps:
            memory.madvise(mmap.MADV_DONTNEED)


MEMORY = Scratch()  # keeps everything in memory
