"""bench.py loader: batches against nanoGPT's get_batch, the wait for them in a real run, the memory of a shared corpus.

The corpus is random tokens in a temporary folder, so the page cache is warm.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scripts.arguments import MAX_PROCESSES, InputError, whole
from scripts.bench_timing import Arms, Result, alternate, compare, pss_bytes, repeat

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue
    from multiprocessing.synchronize import Barrier

    import torch

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "config/quickstart.toml"
ROWS, GLOBAL_BATCH_SIZE, CONTEXT_LENGTH = 30, 480, 1024  # of a worker of config/gpt2-small.toml
BATCHES = 100  # in a block
VOCAB_SIZE = 50_304


def add_parser(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", common: argparse.ArgumentParser
) -> None:
    parser = commands.add_parser("loader", parents=[common], help="batches, the wait for them, memory of the corpus")
    parser.add_argument(
        "--tokens", type=whole(CONTEXT_LENGTH + 1), default=120_000_000, help="in the file; 2 bytes each"
    )
    parser.add_argument("--workers", type=whole(1, MAX_PROCESSES), default=4)
    parser.add_argument("--steps", type=whole(0), default=40, help="of training with config/quickstart.toml; 0: none")
    parser.set_defaults(command=bench_loader)


def bench_loader(args: argparse.Namespace) -> list[Result]:
    from config import load_config

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
    """ms per batch, x and y int64 on the CPU."""
    from data.loader import TokenDataset

    base = "nanoGPT get_batch"
    steps = iter(range(10**9))
    arms: Arms = {base: functools.partial(repeat, functools.partial(nanogpt_get_batch, folder / "train.bin"), BATCHES)}
    for name, in_memory in (("memmap", False), ("in_memory", True)):
        dataset = TokenDataset(folder, CONTEXT_LENGTH, 42, in_memory, vocab_size=VOCAB_SIZE)

        def batch(dataset: TokenDataset = dataset) -> None:
            dataset.batch("train", next(steps), slice(ROWS), GLOBAL_BATCH_SIZE)

        repeat(batch, 3000)  # until the process has mapped most of what it will
        arms[name] = functools.partial(repeat, batch, BATCHES)
    times_s = alternate(arms, rounds)
    rows = compare(times_s, base=base, per=BATCHES)
    for row in rows:
        ratios = [b / t for b, t in zip(times_s[base], times_s[str(row["arm"])], strict=True)]
        row["times as fast"] = round(statistics.median(ratios), 1)
    return rows


def nanogpt_get_batch(path: Path) -> "tuple[torch.Tensor, torch.Tensor]":
    """As nanoGPT's train.py has it: the file is mapped anew for each batch, and rows are copied one by one."""
    import torch

    data = np.memmap(path, dtype=np.uint16, mode="r")
    starts = torch.randint(len(data) - CONTEXT_LENGTH, (ROWS,))
    x = torch.stack([torch.from_numpy(data[i : i + CONTEXT_LENGTH].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + CONTEXT_LENGTH].astype(np.int64)) for i in starts])
    return x, y


def shared_memory(folder: Path, n_workers: int) -> Result:
    """What the corpus takes when so many processes hold it in_memory and have read all of it, over its size."""
    context = multiprocessing.get_context("spawn")  # nothing is shared by a fork
    barrier, answers = context.Barrier(n_workers), context.SimpleQueue()
    workers = [
        context.Process(target=_hold_corpus, args=(rank, folder, barrier, answers), daemon=True)
        for rank in range(n_workers)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise SystemExit("bench.py loader: a worker that should hold the corpus failed")
    held_bytes = sum(answers.get() for _ in workers)
    corpus_bytes = sum(path.stat().st_size for path in folder.glob("*.bin"))
    return {
        "arm": f"in_memory, {n_workers} workers",
        "corpus MB": round(corpus_bytes / 1e6, 1),
        "held MB": round(held_bytes / 1e6, 1),
        "held / corpus": round(held_bytes / corpus_bytes, 3),
    }


def _hold_corpus(rank: int, folder: Path, barrier: "Barrier", answers: "SimpleQueue[int]") -> None:
    """Answers by how much this process's share of memory grew; each page counts 1/n with its n processes."""
    from data.loader import Load, TokenDataset
    from data.node_memory import MemoryFile

    calls = itertools.count()

    def share(load: Load | None) -> MemoryFile:
        place = folder / f"place-{next(calls)}.json"
        if load is not None:
            place.write_text(json.dumps(load()))
        barrier.wait()
        return MemoryFile(*json.loads(place.read_text()))

    np.arange(2**20).max()  # what numpy and Python keep after first use is not the corpus
    barrier.wait()  # what another one loads in the meantime is shared, and takes from ours
    before_bytes = pss_bytes("self")
    barrier.wait()
    dataset = TokenDataset(folder, CONTEXT_LENGTH, 42, True, vocab_size=VOCAB_SIZE, local_rank=rank, share=share)
    for tokens in dataset.tokens.values():
        tokens.max()
    barrier.wait()
    answers.put(pss_bytes("self") - before_bytes)
    barrier.wait()


def waiting(folder: Path, args: argparse.Namespace) -> Result:
    """How long rank 0 waits for batches in a run of the quickstart's configuration."""
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
