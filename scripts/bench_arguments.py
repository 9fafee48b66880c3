"""What bench.py takes: types of its options, and what is found wrong with their values once they are known together."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from data.node_memory import available_bytes

MAX_PROCESSES = 200  # as in netlab.py


class InputError(ValueError):
    """A mistake of the user's; the message is one line."""


def whole(low: int, high: int | None = None, *, step: int = 1) -> Callable[[str], int]:
    """A type of argparse: low, low + step, ... up to high."""
    name = "a whole number" if step == 1 else f"a multiple of {step}"
    bounds = f"from {low} on" if high is None else f"from {low} to {high}"

    def number(text: str) -> int:
        digits = text.replace("_", "")
        if not digits.isdecimal() or int(digits) not in range(low, (high or int(digits)) + 1, step):
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} {bounds}")
        return int(digits)

    return number


def file_to_write(text: str) -> Path:
    """A type of argparse: a path that can be written, as far as that is known before all is measured."""
    path = Path(text)
    if os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"{text!r} is a directory: name a file in it")
    if not os.path.isdir(path.parent):
        raise argparse.ArgumentTypeError(f"there is no directory {path.parent}")
    if not os.access(path if os.path.exists(path) else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} is not for this user to write: name a file elsewhere")
    return path


def require_memory(options: str, n_bytes: int) -> None:
    """
    Raises:
        InputError: what these options ask for is larger than the memory that is left.
    """
    free_bytes = available_bytes()
    if free_bytes is not None and n_bytes > free_bytes:
        found = f"takes {n_bytes // 10**6:,} MB at least, but {free_bytes // 10**6:,} are available"
        raise InputError(f"{options}: {found}: ask for less")
