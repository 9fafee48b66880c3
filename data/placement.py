"""Places of shuffled documents in val.bin and train.bin, and the copy of each document to its place."""

import math
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.corpus import TOKEN
from data.processes import Report, run

SEED = 2357
VAL_TOKENS = 20_000  # in validation at least, where no fraction is given, within
LEAST_FRACTION = 0.0005  # and a tenth of all documents
_BLOCK = 2**15  # documents that are laid out at once

Lengths = npt.NDArray[np.uint32]  # tokens of each document, shape (n_documents,)
Starts = npt.NDArray[np.int64]  # token at which each document starts in val.bin followed by train.bin, same shape


def lay_out(lengths: Lengths, val_fraction: float | None) -> tuple[Starts, int, int]:
    """Return where each document starts, and how many documents and tokens are for validation.

    The order is that of datasets' train_test_split(test_size=val_fraction, seed=2357, shuffle=True). None means
    the fewest shuffled documents that hold VAL_TOKENS, at least LEAST_FRACTION and at most a tenth.

    Raises:
        ValueError: nothing is left to train on.
    """
    n = len(lengths)
    order = np.arange(n, dtype=np.uint32)  # half the memory of rng.permutation(n), and the same order
    np.random.default_rng(SEED).shuffle(order)
    if val_fraction is None:
        most = max(1, n // 10)
        fewest = 1 + int(np.searchsorted(np.cumsum(lengths[order[:most]], dtype=np.int64), VAL_TOKENS))
        n_val = min(max(fewest, math.ceil(LEAST_FRACTION * n)), most)
    else:
        n_val = math.ceil(val_fraction * n)
    if n_val == n:
        raise ValueError(f"--val-fraction {val_fraction:g} of {n} documents leaves none to train on")
    starts = np.empty(n, np.int64)
    end = 0
    for first in range(0, n, _BLOCK):
        block = order[first : first + _BLOCK]
        ends = end + np.cumsum(lengths[block], dtype=np.int64)
        starts[block] = ends - lengths[block]
        end = int(ends[-1])
    return starts, n_val, int(starts[order[n_val]])


def place(
    folder: Path, num_proc: int, lengths: Lengths, ends: list[int], starts: Starts, n_tokens: dict[str, int]
) -> None:
    """Write all documents to train.bin and val.bin. ends: documents up to the end of each part."""
    for split, n in n_tokens.items():
        with open(folder / f"{split}.bin", "wb") as file:
            file.truncate(n * TOKEN.itemsize)
    calls = enumerate(pairwise([0, *ends]))
    state = (folder, lengths, starts, n_tokens["val"])
    total = sum(n_tokens.values()) * TOKEN.itemsize
    list(run(_place_part, calls, state, num_proc, name="placing", total=total))


def _place_part(
    folder: Path,
    lengths: Lengths,
    starts: Starts,
    n_val_tokens: int,
    report: Report,
    number: int,
    documents: tuple[int, int],
) -> None:
    """Write the documents of a part to their places, in a process."""
    part = slice(*documents)
    n_bytes = 0
    with (
        open(folder / f"{number:05}.tokens", "rb") as tokens,
        open(folder / "train.bin", "rb+") as train,
        open(folder / "val.bin", "rb+") as val,
    ):
        for n, start in zip(lengths[part].data, starts[part].data, strict=True):
            file, offset = (val, start) if start < n_val_tokens else (train, start - n_val_tokens)
            _write_at(file.fileno(), tokens.read(n * TOKEN.itemsize), offset * TOKEN.itemsize)
            n_bytes += n * TOKEN.itemsize
            report(n_bytes)


def _write_at(fd: int, data: bytes, offset: int) -> None:
    while len(data) > (n_written := os.pwrite(fd, data, offset)):  # less: the next try says why
        data, offset = data[n_written:], offset + n_written
