"""Limits of numbers in a config, written next to the field: `updates: Annotated[int, "[1, inf)"]`.

An interval has a square bracket on a side whose end is allowed. Texts after it are appended to the error message.
"""

from __future__ import annotations

SEED = "[0, 9223372036854775807]"  # what random generators take


def check(interval: str, hints: tuple[str, ...], value: int | float, where: str) -> None:
    """Raise ValueError that names the key `where` and the allowed values unless `value` is inside the interval."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value > low or (interval[0] == "[" and value == low)
    below = value < high or (interval[-1] == "]" and value == high)
    if not (above and below):
        raise ValueError(f"config key {where} = {value!r}: must be {', '.join([in_words(interval), *hints])}")


def in_words(interval: str) -> str:
    """`>= 1` for "[1, inf)", and `in [0, 1)` for an interval with two ends."""
    low, high = (end.strip() for end in interval[1:-1].split(","))
    if high == "inf":
        return f"{'>=' if interval[0] == '[' else '>'} {low}"
    return f"in {interval[0]}{low}, {high}{interval[-1]}"
