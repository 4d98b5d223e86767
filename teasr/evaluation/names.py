"""Names in the results of an evaluation: of its methods, and of the files of its pictures."""

from __future__ import annotations

BICUBIC, INPUT = "bicubic", "input"
BASELINES = (BICUBIC, INPUT)  # names of the unrestored pictures in the results
SHOWN = "shown"  # folder of the pictures that reports show
CAPTION = "caption.json"  # beside these: which picture it is, and its scores by method


def shown_name(title: str) -> str:
    """Return the file name of a method's picture in `shown/`."""
    return f"{title.replace(' ', '_')}.png"


def step_name(steps: int) -> str:
    """Return the name of a step count in tables, such as "4 steps"."""
    return f"{steps} step{'s' * (steps != 1)}"


def dial_name(steps: int, strength: float) -> str:
    """Return the name of a value of the dial strength in tables, such as "1 step at 0.25"."""
    return f"{step_name(steps)} at {strength:g}"


def steps_of(name: str) -> int | None:
    """Return the step count from a method's name, or None if the name is not a step count."""
    head, _, tail = name.partition(" ")
    return int(head) if head.isdigit() and tail in ("step", "steps") else None


def dial_of(name: str) -> tuple[int, float] | None:
    """Return the step count and the strength from a method's name such as "1 step at 0.25", or None for other names."""
    head, _, tail = name.partition(" at ")
    steps = steps_of(head)
    try:
        return None if steps is None else (steps, float(tail))
    except ValueError:
        return None
