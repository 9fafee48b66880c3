"""bench.py exchange: an exchange of gloo workers against an all-reduce, and the share that a computation hides."""

import argparse
import functools
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from scripts.benchmarks.timing import Arms, Result, alternate, compare, repeat
from scripts.benchmarks.workers import run_in_workers
from scripts.lab.options import MAX_PROCESSES, whole

if TYPE_CHECKING:
    from decent import DecentDP


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=whole(1, MAX_PROCESSES), default=2)
    parser.add_argument("--numel", type=whole(1), default=10_000_000, help="parameters of the model")


def measure(args: argparse.Namespace) -> list[Result]:
    return run_in_workers(_measure, args.workers, args.numel, args.rounds, args.threads)


def _measure(rank: int, n_workers: int, numel: int, rounds: int, n_threads: int | None) -> list[Result]:
    """Return the times of this worker. An exchange is averaged over a period of the topology, whose rounds differ.

    Every worker makes the same calls in the same order: rounds, arms and periods are the same on all.
    """
    import torch
    import torch.distributed as dist
    from torch import nn

    from decent import DecentDP

    if not n_threads:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // n_workers))
    base = "all_reduce"
    arms: Arms = {base: functools.partial(dist.all_reduce, torch.zeros(numel))}
    wrapped = {
        name: DecentDP(nn.Linear(1, numel, bias=False), name, local_world_size=1) for name in topologies(n_workers)
    }
    for name, dp in wrapped.items():
        arms[name] = functools.partial(repeat, lambda dp=dp: (dp.exchange(), dp.mix()), dp.topology.period)
    times_s = alternate(arms, rounds, before=dist.barrier)
    for name, dp in wrapped.items():
        times_s[name] = [t / dp.topology.period for t in times_s[name]]
    rows = compare(times_s, base=base)
    for row, dp in zip(rows[1:], wrapped.values(), strict=True):
        row |= hidden(dp, statistics.median(times_s[str(row["arm"])]), rounds)
    return rows


def topologies(n_workers: int) -> list[str]:
    """Return the names of the topologies that fit n nodes of one worker."""
    from decent import build_topology

    names = []
    for name in ("complete", "ring", "exp", "alternating-exp-ring"):
        try:
            build_topology(name, n_workers, 1)
        except ValueError:
            continue
        names.append(name)
    return names


def hidden(dp: "DecentDP", exchange_s: float, rounds: int) -> Result:
    """Return the share of an exchange that takes no time beside a load as long as itself: a matmul loop, a sleep."""
    import torch
    import torch.distributed as dist

    exchange_s = _from_rank_0(exchange_s)
    a = torch.randn(256, 256)
    matmul = functools.partial(torch.mm, a, a)
    matmul_s = statistics.median(alternate({"matmul": matmul}, 50)["matmul"])
    n_matmuls = math.ceil(_from_rank_0(exchange_s / matmul_s))
    loads: Arms = {
        "matmul": functools.partial(repeat, matmul, n_matmuls),
        "sleep": functools.partial(time.sleep, exchange_s),
    }

    def beside(load: Callable[[], object]) -> None:
        dp.exchange()
        load()
        dp.mix()

    shares: Result = {}
    for name, load in loads.items():
        period = dp.topology.period
        arms: Arms = {
            "alone": functools.partial(repeat, load, period),
            "both": functools.partial(repeat, functools.partial(beside, load), period),
        }
        times_s = alternate(arms, rounds, before=dist.barrier)
        added_s = [(b - a) / period for a, b in zip(times_s["alone"], times_s["both"], strict=True)]
        shares[f"% hidden by {name}"] = round(100 * (1 - statistics.median(added_s) / exchange_s), 1)
    return shares


def _from_rank_0(value: float) -> float:
    """Return rank 0's value on all ranks. A collective."""
    import torch
    import torch.distributed as dist

    shared = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(shared, src=0)
    return shared.item()
