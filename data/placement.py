"""Pass 2 of a preparation: from the spool, where documents lie in source order, to their places in train and val.

nanoGPT's split and order: documents are shuffled with seed 2357 and the first 0.05% are val, the rest train. Written at
random places, read in sequence. A part is deleted when its documents are on the disk, so both together take little more
than one of them where documents are much larger than a block of the disk (4 KB); where they are much smaller, the first
parts touch nearly all blocks of the files, and both are there at once.
"""

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.progress import Progress
from data.spool import intact_tokens, read_part
from data.token_file import TOKEN
from data.workers import run_in_processes

NAME = "placement.npy"
SEED = 2357
VAL_FRACTION = 0.0005

_SYNC_BYTES = 2**30  # placed and not yet deleted, at most
_SMALL_BYTES = 2**24  # for which no process is worth its start


@dataclass(frozen=True)
class Plan:
    """What pass 2 needs to know of pass 1.

    lengths: tokens of each document, shape (n_documents,) uint32, in source order; the last of the parts may hold more.
    """

    lengths: npt.NDArray[np.uint32]
    parts: list[str]  # names, in source order
    part_documents: list[int]
    n_bad: int
    left_out: str  # what is, and why, in words; empty: nothing


class Layout(NamedTuple):
    """starts: token at which a document starts in val.bin followed by train.bin, shape (n_documents,)."""

    starts: npt.NDArray[np.int64]
    n_val: int  # documents
    n_val_tokens: int
    n_tokens: int


def lay_out(lengths: npt.NDArray[np.uint32]) -> Layout:
    """Where each document goes: that of datasets' train_test_split(test_size=0.0005, seed=2357, shuffle=True)."""
    order = np.random.default_rng(SEED).permutation(len(lengths))
    n_val = math.ceil(VAL_FRACTION * len(lengths))
    ends = np.cumsum(lengths[order], dtype=np.int64)
    starts = np.empty_like(ends)
    starts[order] = ends - lengths[order]
    return Layout(starts, n_val, int(ends[n_val - 1]), int(ends[-1]))


def save(folder: Path, plan: Plan) -> None:
    """From now on pass 1 is over, and parts may be deleted."""
    temporary = folder / f"{NAME}.tmp"
    with open(temporary, "wb") as file:
        for field in (plan.lengths, plan.parts, plan.part_documents, plan.n_bad, plan.left_out):
            np.save(file, np.asarray(field))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / NAME)


def load(folder: Path) -> Plan | None:
    """None: pass 1 is not over."""
    try:
        with open(folder / NAME, "rb") as file:
            lengths, parts, part_documents, n_bad, left_out = (np.load(file) for _ in range(5))
    except FileNotFoundError:
        return None
    return Plan(lengths, parts.tolist(), part_documents.tolist(), int(n_bad), str(left_out))


def is_whole(folder: Path, plan: Plan) -> bool:
    """Whether what is placed is still there: the files, if parts are deleted."""
    return all((folder / f"{split}.bin").exists() for split in ("train", "val")) or all(
        (folder / name).exists() for name in plan.parts
    )


def place(folder: Path, plan: Plan, num_proc: int) -> None:
    """Writes the documents of all parts that are there to train.bin and val.bin, and deletes the parts."""
    layout = lay_out(plan.lengths)
    left = [number for number, name in enumerate(plan.parts) if (folder / name).exists()]
    with _open(folder, layout) as fds:
        task = functools.partial(_place_part, folder, plan, layout, fds)
        n_bytes = layout.n_tokens * TOKEN.itemsize
        answers = run_in_processes(task, left, min(num_proc, 1 + n_bytes // _SMALL_BYTES))
        placed: list[Path] = []
        placed_bytes = 0
        with contextlib.closing(answers), Progress("placing", n_bytes) as progress:
            for number, part_bytes in answers:
                placed.append(folder / plan.parts[number])
                placed_bytes += part_bytes
                progress.add(part_bytes, part_bytes // TOKEN.itemsize)
                if placed_bytes >= _SYNC_BYTES:
                    _delete_(placed, fds)
                    placed_bytes = 0
    # What is left may go: the caller waits for the disk before it gives the files their names.


@contextlib.contextmanager
def _open(folder: Path, layout: Layout) -> Iterator[tuple[int, int]]:
    """Descriptors of val.bin and train.bin, which have their final sizes."""
    with contextlib.ExitStack() as stack:
        fds: list[int] = []
        for name, n_tokens in (("val", layout.n_val_tokens), ("train", layout.n_tokens - layout.n_val_tokens)):
            fds.append(os.open(folder / f"{name}.bin", os.O_WRONLY | os.O_CREAT, 0o666))
            stack.callback(os.close, fds[-1])
            os.ftruncate(fds[-1], n_tokens * TOKEN.itemsize)
        yield fds[0], fds[1]


def _place_part(
    folder: Path, plan: Plan, layout: Layout, fds: tuple[int, int], number: int
) -> Iterator[tuple[int, int]]:
    """The number of the part and its bytes."""
    part = read_part(folder / plan.parts[number])
    tokens = intact_tokens(part) if part else None
    if part is None or tokens is None:
        raise ValueError(f"{folder}: its file {plan.parts[number]} is damaged; remove the folder and start again")
    first = sum(plan.part_documents[:number])
    lengths = plan.lengths[first : first + plan.part_documents[number]]  # the limit may cut the last part
    ends = np.cumsum(lengths, dtype=np.int64) * TOKEN.itemsize
    starts = layout.starts[first : first + len(lengths)]
    in_train = starts >= layout.n_val_tokens
    targets = (starts - in_train * layout.n_val_tokens) * TOKEN.itemsize
    data = tokens.data.cast("B")
    begin = 0
    for end, target, split in zip(ends.tolist(), targets.tolist(), in_train.tolist(), strict=True):
        _write(fds[split], data[begin:end], target)
        begin = end
    yield number, len(data)


def _write(fd: int, data: memoryview, offset: int) -> None:
    while len(data) > (n_written := os.pwrite(fd, data, offset)):  # less: the next try says why
        data, offset = data[n_written:], offset + n_written


def _delete_(parts: list[Path], fds: tuple[int, int]) -> None:
    """Deletes parts whose documents are in the files, and empties the list."""
    for fd in fds:
        os.fsync(fd)
    for path in parts:
        path.unlink()
    parts.clear()
