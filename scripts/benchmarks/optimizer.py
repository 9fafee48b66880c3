"""bench.py optimizer: a step of AccumAdamW against torch's AdamW and decent-dp's AccumAdamW, on a GPT's parameters."""

import argparse
import time
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from optim import AccumAdamW
from scripts.benchmarks.gpt import build_gpt
from scripts.benchmarks.timing import Arms, Result, alternate, compare, peak_temporary_bytes


def measure(args: argparse.Namespace) -> list[Result]:
    """Return ms per step, averaged over whole windows, and the most memory that a step allocates and frees again."""
    model = build_gpt(args).to("cuda" if torch.cuda.is_available() else "cpu")
    params = list(model.parameters())
    for p in params:
        p.grad = torch.randn_like(p)
    arms: Arms = {name: optimizer.step for name, optimizer in optimizers(args, params).items()}
    now_s = time.process_time if args.cpu_time else time.perf_counter
    times_s = alternate(arms, args.rounds, per_block=args.accum_steps, now_s=now_s)
    params_bytes = sum(p.nbytes for p in params)
    print(f"{sum(p.numel() for p in params):,} parameters in {len(params)} tensors, {torch.get_num_threads()} threads")
    rows = compare(times_s, base="AdamW fused")
    for row in rows:
        peak_bytes = max(peak_temporary_bytes(arms[str(row["arm"])]) for _ in range(args.accum_steps))
        row["temporary % of parameters"] = round(100 * peak_bytes / params_bytes, 2)
    return rows


def optimizers(args: argparse.Namespace, params: list[nn.Parameter]) -> dict[str, Optimizer]:
    """Return the arms. All update the same parameters with the same hyperparameters, each with a state of its own."""
    shared: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.98), "weight_decay": 0.1}
    arms: dict[str, Optimizer] = {
        "AdamW fused": AdamW(params, **shared, fused=True),
        "AdamW foreach": AdamW(params, **shared, foreach=True),
        "AccumAdamW compiled": AccumAdamW(params, **shared, accum_steps=args.accum_steps),
        "AccumAdamW eager": AccumAdamW(params, **shared, accum_steps=args.accum_steps, compile=False),
    }
    try:
        from decent_dp.optim import AccumAdamW as Theirs  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("decent-dp is not installed: pip install decent-dp==0.2.3 --no-deps")
    else:
        arms["decent-dp AccumAdamW"] = Theirs(params, **shared, accum_iter=args.accum_steps)
    return arms
