"""Runs a function in n real gloo processes and returns what each returned.

The processes fork from a server that has imported torch and the project once: a run of eight takes a second.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT_S = 90

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch.nn.parallel", "torch._dynamo", "hypothesis", "numpy", "pytest", "decent", "optim"]
)


class WorkerError(AssertionError):
    """Rank and traceback of each worker that failed."""


def run_workers(n: int, function: Callable[..., Any], *args: Any, local_world_size: int | None = None) -> list[Any]:
    """Return [function(*args) of rank 0, 1, ...], each called in a process of its own with a gloo process group.

    `function` is found by its name in its module; arguments and results are pickled.
    """
    local = local_world_size or n
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(n):
            ours, theirs = _context.Pipe(duplex=False)
            args_of_rank = (theirs, f"{folder}/store", rank, n, local, function, args)
            processes.append(_context.Process(target=_work, args=args_of_rank, daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        try:
            return _collect(pipes)
        finally:
            for process in processes:
                process.join(0.5)
                process.kill()


def _collect(pipes: list[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + TIMEOUT_S
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    # After the first failure the others get a moment to fail too: theirs may be the cause.
    while waiting and time.monotonic() < deadline:
        for pipe in wait(list(waiting), timeout=0.2):
            rank = waiting.pop(pipe)  # type: ignore[arg-type]
            try:
                ok, value = pickle.loads(pipes[rank].recv_bytes())
            except EOFError:
                ok, value = False, "died without a word"
            (results if ok else failures)[rank] = value
        if failures:
            deadline = min(deadline, time.monotonic() + 2)
    if failures:
        raise WorkerError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
    if waiting:
        raise WorkerError(f"ranks {sorted(waiting.values())} hang after {TIMEOUT_S} s")
    return [results[rank] for rank in range(len(pipes))]


def _work(
    pipe: Connection, store: str, rank: int, n: int, local: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank % local), LOCAL_WORLD_SIZE=str(local))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", store=dist.FileStore(store, n), rank=rank, world_size=n)
        # Plain pickles: multiprocessing's own would hand over tensors in shared memory that dies with its process.
        pipe.send_bytes(pickle.dumps((True, function(*args))))
        dist.barrier()  # nobody leaves while others still talk to it
        dist.destroy_process_group()
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
