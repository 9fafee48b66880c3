"""bench.py loader: batches against nanoGPT's get_batch, the wait for them in a real run, the memory of a shared corpus.

The corpus is random tokens in a temporary folder, so the page cache is warm.
"""

import argparse
import functools
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from config import load_config
from data.loader import TokenDataset
from decent import World
from scripts.benchmarks.timing import Arms, Result, alternate, compare, median_ratio, pss_bytes, run_in_workers
from scripts.lab.options import InputError

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "config/quickstart.toml"
ROWS, GLOBAL_BATCH_SIZE, CONTEXT_LENGTH = 30, 480, 1024  # shape of a worker's batch in config/gpt2-small.toml
VOCAB_SIZE = 50_304


def measure(args: argparse.Namespace) -> list[Result]:
    batch_size = load_config(QUICKSTART).train.global_batch_size
    if args.steps and batch_size % args.workers:
        raise InputError(
            f"--workers {args.workers}: does not divide the batch of config/quickstart.toml, {batch_size}: "
            "take 1, 2, 4, ..., or --steps 0"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split, n_tokens in (("train", args.tokens), ("val", max(args.tokens // 100, 2 * CONTEXT_LENGTH))):
            write_random(folder / f"{split}.bin", n_tokens)
        rows = [*batches(folder, args.rounds), shared_memory(folder, args.workers)]
        return [*rows, waiting(folder, args)] if args.steps else rows


def write_random(path: Path, n_tokens: int) -> None:
    rng = np.random.default_rng(0)
    with open(path, "wb") as file:
        for start in range(0, n_tokens, 10_000_000):
            rng.integers(0, 50_257, min(10_000_000, n_tokens - start), dtype=np.uint16).tofile(file)


def batches(folder: Path, rounds: int) -> list[Result]:
    """Return ms per batch of x and y, each (ROWS, CONTEXT_LENGTH) int64 on the CPU."""
    base = "nanoGPT get_batch"
    steps = itertools.count()
    arms: Arms = {base: functools.partial(nanogpt_get_batch, folder / "train.bin")}
    for name, in_memory in (("memmap", False), ("in_memory", True)):
        dataset = TokenDataset(folder, CONTEXT_LENGTH, 42, in_memory, vocab_size=VOCAB_SIZE)

        def batch(dataset: TokenDataset = dataset) -> None:
            dataset.batch("train", next(steps), slice(ROWS), GLOBAL_BATCH_SIZE)

        for _ in range(3000):  # until the process has mapped most of the pages that it will
            batch()
        arms[name] = batch
    times_s = alternate(arms, rounds, per_block=100)
    rows = compare(times_s, base=base)
    for row in rows:
        row["times as fast"] = round(median_ratio(times_s[base], times_s[str(row["arm"])]), 1)
    return rows


def nanogpt_get_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Return a batch as nanoGPT's train.py makes it: maps the file for each batch, and copies row by row."""
    data = np.memmap(path, dtype=np.uint16, mode="r")
    starts = torch.randint(len(data) - CONTEXT_LENGTH, (ROWS,))
    x = torch.stack([torch.from_numpy(data[i : i + CONTEXT_LENGTH].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + CONTEXT_LENGTH].astype(np.int64)) for i in starts])
    return x, y


def shared_memory(folder: Path, n_workers: int) -> Result:
    """Return the memory of n workers of one node that hold the corpus in_memory and have read it, over its size."""
    held_bytes = run_in_workers(_hold_corpus, n_workers, folder)
    corpus_bytes = sum(path.stat().st_size for path in folder.glob("*.bin"))
    return {
        "arm": f"in_memory, {n_workers} workers",
        "corpus MB": round(corpus_bytes / 1e6, 1),
        "held MB": round(held_bytes / 1e6, 1),
        "held / corpus": round(held_bytes / corpus_bytes, 3),
    }


def _hold_corpus(folder: Path) -> int:
    """Return by how many bytes the memory of all workers grew. A page that n processes share counts 1/n in each."""

    def all_held_bytes() -> int:
        dist.barrier()  # libraries that a worker still loads would be shared, and take from the others' share
        held_bytes = torch.tensor(pss_bytes("self"))
        dist.all_reduce(held_bytes)
        return int(held_bytes)

    rank, n_workers = dist.get_rank(), dist.get_world_size()
    np.arange(2**20).max()  # numpy keeps memory after its first use
    all_held_bytes()  # as does gloo
    before_bytes = all_held_bytes()
    world = World(rank, n_workers, local_rank=rank, local_world_size=n_workers, device=torch.device("cpu"))
    dataset = TokenDataset(
        folder, CONTEXT_LENGTH, 42, True, vocab_size=VOCAB_SIZE, local_rank=rank, share=world.once_per_node
    )
    for tokens in dataset.tokens.values():
        tokens.max()
    return all_held_bytes() - before_bytes


def waiting(folder: Path, args: argparse.Namespace) -> Result:
    """Return how long rank 0 waits for batches in a run of the quickstart's configuration."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.workers}"]
    command += [str(ROOT / "train.py"), str(QUICKSTART), f"data_dir={folder}", f"log_dir={folder}"]
    command += ["log.run_name=run", "train.lr_schedule.warmup_steps=0", f"train.n_steps={args.steps}"]
    command += [f"log.eval_interval={args.steps}", "log.eval_steps=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bench.py loader: the run failed:\n{done.stderr}")
    metrics = json.loads((folder / "run/metrics.jsonl").read_text().splitlines()[-1])
    return {
        "arm": f"quickstart, {args.workers} workers",
        "ms per step": round(metrics["ms_per_step"], 1),
        "waiting ms": round(metrics["data_wait_ms"], 3),
        "waiting %": round(100 * metrics["data_wait_ms"] / metrics["ms_per_step"], 3),
    }
