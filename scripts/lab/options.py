"""Types of the options of bench.py and netlab.py, for argparse."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

MAX_PROCESSES = 200


class InputError(ValueError):
    """A mistake of the user's; the message is one line."""


def whole(low: int, high: int | None = None, *, step: int = 1) -> Callable[[str], int]:
    """Return a parser of the numbers low, low + step, ..., up to high."""
    name = "a whole number" if step == 1 else f"a multiple of {step}"
    bounds = f"from {low} on" if high is None else f"from {low} to {high}"

    def number(text: str) -> int:
        digits = text.replace("_", "")
        if not digits.isdecimal() or int(digits) not in range(low, (high or int(digits)) + 1, step):
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} {bounds}")
        return int(digits)

    return number


def at_least(low: float) -> Callable[[str], float]:
    """Return a parser of the finite numbers from `low` on."""

    def number(text: str) -> float:
        if not low <= float(text) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low:g} on")
        return float(text)

    return number


def file_to_write(text: str) -> Path:
    """Return the path of a result file, which is checked before anything is measured."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a directory")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} cannot be written")
    return path
