"""Batches of token windows, as a pure function of (seed, stream, step): there is no position to save or to replay.

Shapes: B sequences of the global batch, T = context_length tokens. A window is T + 1 tokens: x is its first T, the
targets y its last T.
"""

import mmap
import os
import shutil
import weakref
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from data.token_file import TOKEN, Tokens, open_tokens

Split = Literal["train", "val"]
Batch = tuple[Tensor, Tensor]  # x, y

_SCAN_TOKENS = 2**27  # 256 MB: what is read of a file before training starts, to find ids that the model lacks
_AHEAD = 2  # batches made before they are asked for


class TokenError(ValueError):
    """A token id that the model has no embedding for."""


class MemoryFile(NamedTuple):
    """An anonymous file in memory, as other processes of the machine find it."""

    pid: int
    fd: int
    inode: int


class TokenDataset:
    """Draws windows uniformly, with replacement, from data_dir/train.bin and data_dir/val.bin.

    in_memory: hold both files in memory, once per node, instead of mapping them from disk. `share` makes it once per
    node: a collective of the node's workers that returns what the worker with local_rank 0 passed to it. The
    constructor calls it twice, after all checks. None: this worker has no others beside it.

    Raises:
        ValueError: open_tokens rejects a file.
        TokenError: a token id is not below vocab_size, in the first 256 MB of a file; `batch` checks the rest.
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
        share: Callable[[MemoryFile | None], MemoryFile | None] | None = None,
    ) -> None:
        self.context_length = context_length
        self.seed = seed
        self.vocab_size = vocab_size
        splits: tuple[Split, ...] = ("train", "val")
        self.paths = {split: Path(data_dir) / f"{split}.bin" for split in splits}
        self.tokens = {split: open_tokens(path, context_length + 1) for split, path in self.paths.items()}
        for split in splits:
            self._check_ids(split, self.tokens[split][:_SCAN_TOKENS])
        if in_memory:
            self.tokens = {split: self._load(path, local_rank, share) for split, path in self.paths.items()}
        self._windows = {  # (n_tokens - T, T + 1) views: row i is the window that starts at token i
            split: sliding_window_view(tokens, context_length + 1) for split, tokens in self.tokens.items()
        }

    def batch(self, split: Split, step: int, rows: slice, global_batch_size: int, *, evaluation: bool = False) -> Batch:
        """x, y of the given rows of a step's global batch, each (rows, T) int64; y is x one token later.

        The same arguments give the same batch in every process, and the rows of a step do not depend on who takes
        them. evaluation selects the stream of evaluation batches; "val" has no other.

        Raises:
            TokenError: a token id is not below vocab_size.
        """
        assert step >= 0
        assert 0 <= (rows.start or 0) <= (rows.stop or global_batch_size) <= global_batch_size
        stream = 0 if split == "train" and not evaluation else 1 + list(self.paths).index(split)
        starts = _draw(self.seed, stream, step, global_batch_size, n=len(self._windows[split]))[rows]
        windows = self._windows[split][starts]  # (rows, T + 1) uint16, the one copy of the tokens
        self._check_ids(split, windows)
        x, y = windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)
        return torch.from_numpy(x), torch.from_numpy(y)

    def _check_ids(self, split: Split, tokens: Tokens) -> None:
        if self.vocab_size < 2**16 and (largest := int(tokens.max(initial=0))) >= self.vocab_size:
            raise TokenError(
                f"{self.paths[split]}: holds token id {largest}, but model.vocab_size = {self.vocab_size} ends at "
                f"{self.vocab_size - 1}; set it to at least {largest + 1} (all of GPT-2's need 50257)"
            )

    def _load(
        self, path: Path, local_rank: int, share: Callable[[MemoryFile | None], MemoryFile | None] | None
    ) -> Tokens:
        """The whole file in memory, shape (n_tokens,), read-only."""
        if share is None or not hasattr(os, "memfd_create"):  # the latter: not on Linux
            tokens = np.fromfile(path, dtype=TOKEN)
            tokens.flags.writeable = False
            return tokens
        memory = share(self._copy_to_memory(path) if local_rank == 0 else None)
        assert memory is not None
        return _map(memory)

    def _copy_to_memory(self, path: Path) -> MemoryFile:
        """Memory without a name in any file system: it is freed with the last process that maps it, however that dies.

        The descriptor stays open as long as this object, for the other workers to open through /proc.
        """
        fd = os.memfd_create(path.name)
        weakref.finalize(self, os.close, fd)
        with open(path, "rb") as source, open(fd, "wb", closefd=False) as memory:
            shutil.copyfileobj(source, memory, 2**24)
        return MemoryFile(os.getpid(), fd, os.fstat(fd).st_ino)


def _draw(seed: int, stream: int, step: int, size: int, *, n: int) -> np.ndarray:
    """`size` numbers of 0..n-1, uint64: draws of the Philox generator with key (seed, stream) at counter step * 2^64.

    Raw bits modulo n, not Generator.integers: numpy keeps only the former the same in all its versions. The bias of
    the modulo is below n / 2^64.
    """
    key, counter = (np.array(words, dtype=np.uint64) for words in ([seed, stream], [0, step, 0, 0]))
    return np.random.Philox(key=key, counter=counter).random_raw(size) % np.uint64(n)


def _map(memory: MemoryFile) -> Tokens:
    path = f"/proc/{memory.pid}/fd/{memory.fd}"
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_ino != memory.inode:
                raise OSError("it is another file")
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=TOKEN)
    except OSError as error:
        raise ValueError(
            f"in_memory = true: the memory of local rank 0 cannot be opened at {path} ({error}); "
            "set in_memory = false, or run the node's workers in one container under one user"
        ) from None


def prefetch(
    batch_of: Callable[[int], Batch], first_step: int, n_steps: int, *, device: torch.device | str
) -> Generator[Batch, None, None]:
    """Yields batch_of(step) on `device` for the steps from first_step to n_steps - 1, made two ahead in one thread.

    An exception of batch_of is raised where its step is asked for. Closing the iterator, also by leaving it, ends the
    thread.
    """
    device = torch.device(device)
    on_cuda = device.type == "cuda"

    def make(step: int) -> Batch:
        x, y = batch_of(step)
        if not on_cuda:
            return x, y
        with torch.cuda.device(device):  # pinning would otherwise open a context on GPU 0, in every worker
            return x.pin_memory(), y.pin_memory()

    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    try:
        pending = deque(thread.submit(make, step) for step in range(first_step, min(first_step + _AHEAD, n_steps)))
        for step in range(first_step, n_steps):
            x, y = pending.popleft().result()
            if step + _AHEAD < n_steps:
                pending.append(thread.submit(make, step + _AHEAD))
            yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)
    finally:
        thread.shutdown(cancel_futures=True)
