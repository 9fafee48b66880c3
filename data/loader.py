"""Batches of token windows, as a pure function of (seed, stream, step): there is no position to save or to replay.

Shapes: B sequences of the global batch, T = context_length tokens. A window is T + 1 tokens: x is its first T, the
targets y its last T. Windows travel to the device as the uint16 of the file, a quarter of int64, and are widened there.
"""

import functools
import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from data.corpus import TOKEN, Tokens, open_tokens
from data.node_memory import MemoryFile, copy_to_memory, map_memory, require_memory

Split = Literal["train", "val"]
Batch = tuple[Tensor, Tensor]  # x, y
Load = Callable[[], MemoryFile]
Share = Callable[[Load | None], MemoryFile]

_SCAN_TOKENS = 2**27  # 256 MB: what is read of a file before training starts, to find ids that the model lacks
_AHEAD = 2  # batches made before they are asked for
_MAPPED_BYTES = 2**28  # of a file on disk: as much of it as may be resident in a process
_FAULT_BYTES = 2**16  # what Linux maps around a page that is touched


class TokenError(ValueError):
    """What is found wrong with a token file only while it is trained on; the message is one line."""


class TokenDataset:
    """Draws windows uniformly, with replacement, from data_dir/train.bin and data_dir/val.bin.

    in_memory: hold both files in memory, once per node, instead of mapping them from disk. `share` makes it once per
    node: a collective of the node's workers that calls what the worker with local_rank 0 passes to it and returns the
    result to all. The constructor calls it twice, after all checks. None: this worker has no others beside it.

    Raises:
        ValueError: open_tokens rejects a file, or the memory is too small for them.
        TokenError: a token id is not below vocab_size, in the first 256 MB of a file; `windows` checks the rest.
    """

    def __init__(
        self,
        data_dir: str | Path,
        context_length: int,
        seed: int,
        in_memory: bool = False,
        *,
        vocab_size: int = 2**16,
        local_rank: int = 0,
        share: Share | None = None,
    ) -> None:
        self.context_length = context_length
        self.seed = seed
        self.vocab_size = vocab_size
        self.paths: dict[Split, Path] = {"train": Path(data_dir) / "train.bin", "val": Path(data_dir) / "val.bin"}
        for split, path in self.paths.items():
            self._check_ids(split, open_tokens(path, context_length + 1)[:_SCAN_TOKENS])
        if in_memory and local_rank == 0:
            require_memory(list(self.paths.values()))
        self._maps: dict[Split, mmap.mmap] = {
            split: self._load(path, local_rank, share) if in_memory else _map(path)
            for split, path in self.paths.items()
        }
        self.tokens: dict[Split, Tokens] = {
            split: np.frombuffer(mapping, dtype=TOKEN) for split, mapping in self._maps.items()
        }
        self._windows = {  # (n_tokens - T, T + 1) views: row i is the window that starts at token i
            split: sliding_window_view(tokens, context_length + 1) for split, tokens in self.tokens.items()
        }
        self._in_memory = in_memory
        self._mapped_bytes = 0  # of the files on disk, at most; since the mappings were last emptied

    def windows(
        self, split: Split, step: int, rows: slice, global_batch_size: int, *, evaluation: bool = False
    ) -> Tensor:
        """The given rows of a step's global batch, (rows, T + 1) uint16.

        The same arguments give the same windows in every process, and the rows of a step do not depend on who takes
        them. evaluation selects the stream of evaluation batches; "val" has no other.

        Raises:
            TokenError: a token id is not below vocab_size, or the file has become shorter.
        """
        assert step >= 0
        assert 0 <= (rows.start or 0) <= (rows.stop or global_batch_size) <= global_batch_size
        stream = 0 if split == "train" and not evaluation else 1 + list(self.paths).index(split)
        starts = _draw(self.seed, stream, step, global_batch_size, rows, n=len(self._windows[split]))
        self._prepare_reading(split, len(starts))
        return self._checked(split, self._windows[split][starts])  # the one copy of the tokens on the host

    def windows_in_order(self, split: Split, first: int, n: int) -> Tensor:
        """Windows first, ..., first + n - 1 of those that start at tokens 0, T, 2T, ..., (n, T + 1) uint16.

        In them every token of the split but the first is a target exactly once. Zeros follow the end of the file.

        Raises:
            TokenError: as `windows`.
        """
        T = self.context_length
        tokens = np.zeros(n * T + 1, dtype=TOKEN)
        self._prepare_reading(split, n)
        there = self.tokens[split][first * T : (first + n) * T + 1]
        tokens[: len(there)] = there
        return self._checked(split, sliding_window_view(tokens, T + 1)[::T].copy())

    def n_targets(self, split: Split) -> int:
        """Tokens that have one before them."""
        return len(self.tokens[split]) - 1

    def batch(self, split: Split, step: int, rows: slice, global_batch_size: int, *, evaluation: bool = False) -> Batch:
        """x, y of `windows`, each (rows, T) int64; y is x one token later."""
        return widen(self.windows(split, step, rows, global_batch_size, evaluation=evaluation))

    def batches(
        self,
        split: Split,
        steps: range,
        rows: slice,
        global_batch_size: int,
        *,
        device: torch.device,
        evaluation: bool = False,
    ) -> Generator[Batch]:
        """The `batch` of each step on the device, made ahead by a thread; see `prefetch`."""
        return prefetch(
            lambda step: self.windows(split, step, rows, global_batch_size, evaluation=evaluation),
            steps.start,
            steps.stop,
            device=device,
        )

    def _prepare_reading(self, split: Split, n_windows: int) -> None:
        """Before pages of a mapping are touched.

        Mapped pages that were read stay resident until the whole corpus is: from time to time they are given back,
        which costs no reading, since the page cache keeps them. A page that lies behind the end of a file that was cut
        kills the process without a word. This finds the cut before it, unless the cut is made in the same microseconds.
        """
        if self._in_memory:
            return
        n_now = self._maps[split].size() // TOKEN.itemsize  # of the file, not of the mapping
        if n_now < len(self.tokens[split]):
            raise TokenError(
                f"{self.paths[split]}: held {len(self.tokens[split])} tokens when training started, and holds {n_now} "
                "now: leave it alone while a run reads it, or set in_memory = true"
            )
        self._mapped_bytes += n_windows * (_FAULT_BYTES + TOKEN.itemsize * (self.context_length + 1))
        if self._mapped_bytes > _MAPPED_BYTES:
            self._mapped_bytes = 0
            for mapping in self._maps.values():
                if len(mapping) > _MAPPED_BYTES:
                    mapping.madvise(mmap.MADV_DONTNEED)

    def _checked(self, split: Split, windows: Tokens) -> Tensor:
        self._check_ids(split, windows)
        return torch.from_numpy(windows)

    def _check_ids(self, split: Split, tokens: Tokens) -> None:
        if self.vocab_size < 2**16 and (largest := int(tokens.max(initial=0))) >= self.vocab_size:
            raise TokenError(
                f"{self.paths[split]}: holds token id {largest}, but model.vocab_size = {self.vocab_size} ends at "
                f"{self.vocab_size - 1}; set it to at least {largest + 1} (all of GPT-2's need 50257)"
            )

    def _load(self, path: Path, local_rank: int, share: Share | None) -> mmap.mmap:
        """The file in the node's memory; its descriptor stays open, for the other workers, as long as this object."""
        if not hasattr(os, "memfd_create"):
            return _map(path)  # not on Linux: the page cache has to do
        load = functools.partial(copy_to_memory, path)
        memory = share(load if local_rank == 0 else None) if share is not None else load()
        if local_rank == 0:
            weakref.finalize(self, os.close, memory.fd)
        return map_memory(memory)


def widen(windows: Tensor) -> Batch:
    """x, y of windows (rows, T + 1) uint16, each (rows, T) int64 on the same device; the halves of one tensor."""
    pairs = windows.unfold(1, windows.shape[1] - 1, 1).transpose(0, 1)  # (2, rows, T), a view
    x, y = pairs.to(torch.int64, memory_format=torch.contiguous_format)
    return x, y


def _map(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # Without this a window of 2 KB reads 128 KB and more from the disk or the network.
    mapping.madvise(mmap.MADV_RANDOM)
    return mapping


def _draw(seed: int, stream: int, step: int, size: int, rows: slice, *, n: int) -> np.ndarray:
    """`rows` of `size` numbers of 0..n-1, uint64: draws of the Philox generator with key (seed, stream) at counter
    step * 2^64.

    Raw bits modulo n, not Generator.integers: numpy keeps only the former the same in all its versions. The bias of
    the modulo is below n / 2^64.
    """
    counter = np.array([0, step, 0, 0], dtype=np.uint64)
    philox = np.random.Philox(_Key([seed, stream]), counter)  # pyright: ignore[reportArgumentType]: the stub forgets it
    return philox.random_raw(size)[rows] % np.uint64(n)


class _Key(np.random.bit_generator.ISeedSequence):
    """A key as it is. Philox(key=...) takes it too, but first asks the system for entropy that it does not use, and
    that takes longer than the draw."""

    def __init__(self, words: list[int]) -> None:
        self.words = np.array(words, dtype=np.uint64)

    def generate_state(self, n_words: int, dtype: npt.DTypeLike = np.uint32) -> np.ndarray:
        return self.words


def prefetch(
    windows_of: Callable[[int], Tensor], first_step: int, n_steps: int, *, device: torch.device | str
) -> Generator[Batch, None, None]:
    """Yields x, y of windows_of(step) on `device` for the steps from first_step to n_steps - 1.

    The windows are made two steps ahead in one thread. An exception of windows_of is raised where its step is asked
    for. Closing the iterator, also by leaving it, ends the thread.
    """
    device = torch.device(device)

    def make(step: int) -> Tensor:
        windows = windows_of(step)
        if device.type != "cuda":
            return windows
        with torch.cuda.device(device):  # pinning would otherwise open a context on GPU 0, in every worker
            return windows.pin_memory()

    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    try:
        pending = deque(thread.submit(make, step) for step in range(first_step, min(first_step + _AHEAD, n_steps)))
        for step in range(first_step, n_steps):
            windows = pending.popleft().result()
            if step + _AHEAD < n_steps:
                pending.append(thread.submit(make, step + _AHEAD))
            yield widen(windows.to(device, non_blocking=True))
    finally:
        thread.shutdown(cancel_futures=True)
