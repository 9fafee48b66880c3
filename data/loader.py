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
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from data.corpus import TOKEN, Tokens, open_tokens
from data.node_memory import MemoryFile, copy_to_memory, map_memory

Split = Literal["train", "val"]
Batch = tuple[Tensor, Tensor]  # x, y
Load = Callable[[], MemoryFile]
Share = Callable[[Load | None], MemoryFile]

_SCAN_TOKENS = 2**27  # tokens per file (256 MB) whose ids are checked before training starts
_AHEAD = 2  # batches that are made before they are asked for
_RESIDENT_BYTES = 2**28  # limit of resident pages per mapped file
_FAULT_BYTES = 2**21  # most that Linux maps when a page is touched: a folio of the page cache


class TokenError(ValueError):
    """A token file turned out to be invalid, maybe during training. The message is one line."""

    exit_code = 2


class TokenDataset:
    """Windows of data_dir/train.bin and data_dir/val.bin, drawn uniformly with replacement.

    in_memory: hold both files in memory, once per node, instead of mapping them from disk. `share` is a collective of
    all workers: it calls the Load of local rank 0, and returns the result to the workers of that node. The constructor
    calls it once, after all checks. None means that this worker is alone on its node.

    Raises:
        ValueError: open_tokens rejects a file, or the memory is too small for both.
        TokenError: one of the first 2^27 token ids of a file is not below vocab_size. `windows` checks the rest.
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
        self.context_length, self.seed, self.vocab_size = context_length, seed, vocab_size
        self.paths: dict[Split, Path] = {"train": Path(data_dir) / "train.bin", "val": Path(data_dir) / "val.bin"}
        self.tokens: dict[Split, Tokens] = {}
        self._maps: dict[Split, mmap.mmap] = {}  # mapped files, none if they are in memory
        self._resident_bytes = 0  # upper limit for the mapped files
        for split, path in self.paths.items():
            self.tokens[split] = open_tokens(path, context_length + 1)
            self._checked(split, self.tokens[split][:_SCAN_TOKENS])
        if in_memory and hasattr(os, "memfd_create"):  # elsewhere than on Linux the page cache has to do
            load = functools.partial(copy_to_memory, list(self.paths.values()))
            memory = share(load if local_rank == 0 else None) if share is not None else load()
            if local_rank == 0:
                weakref.finalize(self, os.close, memory.fd)  # until then the other workers can open it
            tokens = np.frombuffer(map_memory(memory), dtype=TOKEN)
            self.tokens["train"], self.tokens["val"] = np.split(tokens, [len(self.tokens["train"])])
        else:
            self._maps = {split: _map_file(path) for split, path in self.paths.items()}
            self.tokens = {split: np.frombuffer(mapping, dtype=TOKEN) for split, mapping in self._maps.items()}
        self._windows = {  # (n_tokens - T, T + 1) views: row i is the window that starts at token i
            split: sliding_window_view(tokens, context_length + 1) for split, tokens in self.tokens.items()
        }

    def windows(
        self, split: Split, step: int, rows: slice, global_batch_size: int, *, evaluation: bool = False
    ) -> Tensor:
        """Return the given rows of a step's global batch, (rows, T + 1) uint16.

        The same arguments give the same windows in every process, whichever worker takes them. evaluation selects the
        stream of evaluation batches, which is the only one of "val".

        Raises:
            TokenError: a token id is not below vocab_size, or the file has become shorter.
        """
        stream = 2 if split == "val" else int(evaluation)
        starts = window_starts(self.seed, stream, step, global_batch_size, rows, n=len(self._windows[split]))
        self._prepare_reading(split, len(starts))
        windows = self._windows[split][starts]  # the one copy of the tokens on the host
        return torch.from_numpy(self._checked(split, windows))

    def windows_in_order(self, split: Split, first: int, n: int) -> Tensor:
        """Return the windows that start at tokens first * T, ..., (first + n - 1) * T, (n, T + 1) uint16.

        Over all such windows, every token of the split but the first is a target once. Zeros follow the last token.
        """
        T = self.context_length
        self._prepare_reading(split, n)
        tokens = self.tokens[split][first * T : (first + n) * T + 1]
        tokens = np.pad(tokens, (0, n * T + 1 - len(tokens)))
        return torch.from_numpy(self._checked(split, sliding_window_view(tokens, T + 1)[::T].copy()))

    def n_targets(self, split: Split) -> int:
        """Number of tokens that have one before them."""
        return len(self.tokens[split]) - 1

    def batch(self, split: Split, step: int, rows: slice, global_batch_size: int, *, evaluation: bool = False) -> Batch:
        """Return x, y of `windows`, each (rows, T) int64; y is x one token later."""
        return widen(self.windows(split, step, rows, global_batch_size, evaluation=evaluation))

    def batches(
        self, split: Split, steps: range, rows: slice, size: int, *, device: torch.device, evaluation: bool = False
    ) -> Generator[Batch]:
        """Yield the `batch` of each step on the device, made ahead by `prefetch`. size: rows of a global batch."""
        windows_of = functools.partial(self.windows, split, rows=rows, global_batch_size=size, evaluation=evaluation)
        return prefetch(windows_of, steps, device=device)

    def _prepare_reading(self, split: Split, n_windows: int) -> None:
        """Check the length of a mapped file, and limit its resident pages; the page cache keeps what is given back."""
        if split not in self._maps:
            return
        n_now = self._maps[split].size() // TOKEN.itemsize  # size of the file, not of the mapping
        if n_now < len(self.tokens[split]):  # a page behind its end would kill the process without a message
            raise TokenError(
                f"{self.paths[split]}: held {len(self.tokens[split])} tokens when training started, and holds {n_now} "
                "now: leave it alone while a run reads it, or set in_memory = true"
            )
        n_bytes = n_windows * (_FAULT_BYTES + TOKEN.itemsize * (self.context_length + 1))
        self._resident_bytes += n_bytes
        if self._resident_bytes > _RESIDENT_BYTES:
            self._resident_bytes = n_bytes
            for mapping in self._maps.values():
                if len(mapping) > _RESIDENT_BYTES:
                    mapping.madvise(mmap.MADV_DONTNEED)

    def _checked(self, split: Split, tokens: Tokens) -> Tokens:
        """Return the tokens, or raise TokenError if one is not below vocab_size."""
        if (largest := int(tokens.max(initial=0))) >= self.vocab_size:
            raise TokenError(
                f"{self.paths[split]}: holds token id {largest}, but model.vocab_size = {self.vocab_size} ends at "
                f"{self.vocab_size - 1}; set it to at least {largest + 1} (all of GPT-2's need 50257)"
            )
        return tokens


def window_starts(seed: int, stream: int, step: int, size: int, rows: slice, *, n: int) -> np.ndarray:
    """Return `rows` of `size` draws from 0..n-1, uint64: Philox with key (seed, stream) at counter step * 2^64.

    Raw bits modulo n, since numpy may change Generator.integers in any version. The bias is below n / 2^64.
    """
    key, counter = np.array([seed, stream], np.uint64), np.array([0, step, 0, 0], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(size)[rows] % np.uint64(n)


def widen(windows: Tensor) -> Batch:
    """Return x, y of windows (rows, T + 1) uint16, each (rows, T) int64 on the same device; halves of one tensor."""
    pairs = windows.unfold(1, windows.shape[1] - 1, 1).transpose(0, 1)  # (2, rows, T), a view
    x, y = pairs.to(torch.int64, memory_format=torch.contiguous_format)
    return x, y


def prefetch(windows_of: Callable[[int], Tensor], steps: range, *, device: torch.device) -> Generator[Batch]:
    """Yield x, y of windows_of(step) on `device` for each step.

    One thread makes the windows two steps ahead. An exception of windows_of is raised at its step. Closing the
    generator, also by dropping it, ends the thread.
    """

    def make(step: int) -> Tensor:
        windows = windows_of(step)
        if device.type != "cuda":
            return windows
        with torch.cuda.device(device):  # pinning would otherwise open a context on GPU 0, in every worker
            return windows.pin_memory()

    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    try:
        pending = deque(thread.submit(make, step) for step in steps[:_AHEAD])
        for i in range(len(steps)):
            windows = pending.popleft().result()
            pending.extend(thread.submit(make, step) for step in steps[i + _AHEAD : i + _AHEAD + 1])
            yield widen(windows.to(device, non_blocking=True))
    finally:
        thread.shutdown(cancel_futures=True)


def _map_file(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapping.madvise(mmap.MADV_RANDOM)  # or a window of 2 KB reads 128 KB and more from the disk or the network
    return mapping
