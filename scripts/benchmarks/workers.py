"""Gloo workers on this machine, for benchmarks that need several."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_in_workers(work: Callable[..., Any], n_workers: int, *args: Any) -> Any:
    """Call work(rank, n_workers, *args) in n workers of one process group. Return rank 0's result, by way of JSON."""
    import torch.multiprocessing

    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        torch.multiprocessing.spawn(_worker, (n_workers, f"{folder}/store", answer, work, args), nprocs=n_workers)
        return json.loads(answer.read_text())


def _worker(
    rank: int, n_workers: int, store: str, answer: Path, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.FileStore(store, n_workers), rank=rank, world_size=n_workers)
    result = work(rank, n_workers, *args)
    if rank == 0:
        answer.write_text(json.dumps(result))
    dist.destroy_process_group()
