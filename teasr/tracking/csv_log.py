"""CSV logs with one row per update: a failed append leaves no partial row, and readers can fetch only the new rows."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

from teasr.util.files import write_atomic


class CsvLog:
    """Appends rows of numbers, one per update, and flushes each; a new column rewrites the file.

    Resuming drops the rows of later updates. While the file cannot be written (for example, because the disk is full),
    rows are kept in memory and written with the next append that succeeds.
    """

    def __init__(self, path: Path, resume_from: int = 0):
        """Keep the existing rows up to update `resume_from`; 0 starts an empty file."""
        self.path = path
        rows = [row for row in read_rows(path) if int(row["update"]) <= resume_from] if resume_from else []
        self.columns = list(rows[0]) if rows else ["update"]
        self._rewrite(rows)
        self._waiting: list[dict] = []

    def _rewrite(self, rows: list[dict]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self.path, text.getvalue().encode())

    def append(self, update: int, values: dict[str, float]) -> None:
        """Add one row; integers are written as integers, other numbers with 9 significant digits."""
        self._waiting.append({"update": update} | {k: v if type(v) is int else f"{v:.9g}" for k, v in values.items()})
        try:
            self._write()
        except OSError as error:
            if len(self._waiting) == 1:
                print(
                    f"warning: {self.path} cannot be written ({error.strerror}): rows are kept in memory until it can",
                    flush=True,
                )
            return
        self._waiting = []

    def _write(self) -> None:
        new = dict.fromkeys(name for row in self._waiting for name in row if name not in self.columns)
        if new:
            rows = read_rows(self.path)
            columns, self.columns = self.columns, [*self.columns, *new]
            try:
                self._rewrite(rows)
            except OSError:
                self.columns = columns
                raise
        text = io.StringIO()
        csv.DictWriter(text, self.columns, lineterminator="\n").writerows(self._waiting)
        size = self.path.stat().st_size
        try:
            with open(self.path, "a") as file:
                file.write(text.getvalue())
        except OSError:
            os.truncate(self.path, size)  # leave no partial row
            raise


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return all complete rows of a log; none if the file does not exist. Raises ValueError when it is damaged."""
    if not path.is_file():
        return []
    text = path.read_bytes()
    text = text[: text.rfind(b"\n") + 1].decode(errors="replace")  # the last line may be incomplete after a crash
    try:
        rows = list(csv.DictReader(io.StringIO(text), strict=True))
        wrong = [i for i, row in enumerate(rows, 2) if None in row or None in row.values() or not _is_update(row)]
    except csv.Error as error:
        raise ValueError(f"{path} is damaged ({error}): repair it, or move it to another folder") from None
    if wrong:
        raise ValueError(f"{path} is damaged (line {wrong[0]}): repair it, or move it to another folder")
    return rows


def last_update(path: Path) -> int:
    """Return the newest update of a log; 0 without one. Raises ValueError when the file is damaged."""
    return max((int(row["update"]) for row in read_rows(path)), default=0)


def _is_update(row: dict[str, str]) -> bool:
    return row.get("update", "").isdecimal()


class Tail:
    """Reads the rows added to a CSV file since the previous read, or all rows again if a column was added."""

    def __init__(self, path: Path):
        self.path, self.header, self.offset = path, b"", 0

    def rows(self) -> list[dict[str, str]]:
        """Return new complete rows. Raises OSError when the file does not exist."""
        with open(self.path, "rb") as file:
            header = file.readline()
            if header != self.header:
                self.header, self.offset = header, file.tell()
            file.seek(self.offset)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self.offset += len(text)
        columns = self.header.decode().strip().split(",")
        return [dict(zip(columns, line.split(","), strict=True)) for line in text.decode().splitlines()]
