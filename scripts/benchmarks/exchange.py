"""bench.py exchange: an exchange of gloo workers against an all-reduce, and the share that a computation hides."""

import argparse
import functools
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import nn

from config import TopologyName
from decent import DecentDP
from scripts.benchmarks.timing import Arms, Result, alternate, compare, run_in_workers


def measure(args: argparse.Namespace) -> list[Result]:
    return run_in_workers(_measure, args.workers, args)


def _measure(args: argparse.Namespace) -> list[Result]:
    """Return the times of this worker. An exchange is averaged over a period of the topology, whose rounds differ.

    Every worker makes the same calls in the same order: rounds, arms and periods are the same on all.
    """
    if not args.threads:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.workers))
    names = [name for name in get_args(TopologyName) if args.workers % 2 == 0 or name != "alternating-exp-ring"]
    wrapped = {name: DecentDP(nn.Linear(1, args.numel, bias=False), name, local_world_size=1) for name in names}
    arms: Arms = {"all_reduce": functools.partial(dist.all_reduce, torch.zeros(args.numel))}
    for name, dp in wrapped.items():
        arms[name] = functools.partial(exchange_a_period, dp)
    times_s = alternate(arms, args.rounds, before=dist.barrier)
    for name, dp in wrapped.items():
        times_s[name] = [t / dp.topology.period for t in times_s[name]]
    rows = compare(times_s, base="all_reduce")
    for row, (name, dp) in zip(rows[1:], wrapped.items(), strict=True):
        row |= hidden(dp, statistics.median(times_s[name]), args.rounds)
    return rows


def exchange_a_period(dp: DecentDP, load: Callable[[], object] = lambda: None) -> None:
    """Make the exchanges of a period, each beside a load."""
    for _ in range(dp.topology.period):
        dp.exchange()
        load()
        dp.mix()


def hidden(dp: DecentDP, exchange_s: float, rounds: int) -> Result:
    """Return the share of an exchange that takes no time beside a load as long as itself: a matmul loop, a sleep."""
    a = torch.randn(256, 256)
    matmul_s = statistics.median(alternate({"matmul": lambda: torch.mm(a, a)}, 50)["matmul"])
    plan: list[Any] = [exchange_s, math.ceil(exchange_s / matmul_s)]
    dist.broadcast_object_list(plan)  # rank 0's on all ranks
    exchange_s, n_matmuls = plan

    def multiply() -> None:
        for _ in range(n_matmuls):
            torch.mm(a, a)

    shares: Result = {}
    loads: Arms = {"matmul": multiply, "sleep": functools.partial(time.sleep, exchange_s)}
    for name, load in loads.items():
        arms: Arms = {"alone": load, "both": functools.partial(exchange_a_period, dp, load)}
        times_s = alternate(arms, rounds, before=dist.barrier)
        added_s = [
            both / dp.topology.period - alone for alone, both in zip(times_s["alone"], times_s["both"], strict=True)
        ]
        shares[f"% hidden by {name}"] = round(100 * (1 - statistics.median(added_s) / exchange_s), 1)
    return shares
