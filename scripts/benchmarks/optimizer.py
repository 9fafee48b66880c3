"""bench.py optimizer: a step of AccumAdamW against torch's AdamW and decent-dp's AccumAdamW, on a GPT's parameters."""

import argparse
import functools
import time
from typing import TYPE_CHECKING, Any

from scripts.benchmarks.gpt import add_gpt_arguments, build_gpt
from scripts.benchmarks.timing import Arms, Result, alternate, compare, peak_temporary_bytes, repeat
from scripts.lab.options import whole

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_gpt_arguments(parser, n_layers=6, n_embd=512, vocab_size=20_000)
    parser.add_argument(
        "--accum-steps", type=whole(1), default=8, help="steps of a window, which is a block (default: %(default)s)"
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="with --threads 1 on a shared machine: leave out what others run"
    )


def measure(args: argparse.Namespace) -> list[Result]:
    """Return ms per step, averaged over whole windows, and the most memory that a step allocates and frees again."""
    import torch

    model = build_gpt(args).to("cuda" if torch.cuda.is_available() else "cpu")
    params = list(model.parameters())
    for p in params:
        p.grad = torch.randn_like(p)
    windows: Arms = {
        name: functools.partial(repeat, opt.step, args.accum_steps) for name, opt in optimizers(args, params).items()
    }
    times_s = alternate(windows, args.rounds, now_s=time.process_time if args.cpu_time else time.perf_counter)
    params_bytes = sum(p.nbytes for p in params)
    print(f"{sum(p.numel() for p in params):,} parameters in {len(params)} tensors, {torch.get_num_threads()} threads")
    rows = compare(times_s, base="AdamW fused", per=args.accum_steps)
    for row in rows:
        peak_bytes = peak_temporary_bytes(windows[str(row["arm"])])
        row["temporary % of parameters"] = round(100 * peak_bytes / params_bytes, 2)
    return rows


def optimizers(args: argparse.Namespace, params: "list[nn.Parameter]") -> "dict[str, Optimizer]":
    """Return the arms. All update the same parameters with the same hyperparameters, each with a state of its own."""
    from torch.optim import AdamW

    from optim import AccumAdamW

    shared: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.98), "weight_decay": 0.1}
    arms: dict[str, Optimizer] = {
        "AdamW fused": AdamW(params, **shared, fused=True),
        "AdamW foreach": AdamW(params, **shared, foreach=True),
        "AccumAdamW compiled": AccumAdamW(params, **shared, accum_steps=args.accum_steps),
        "AccumAdamW foreach": AccumAdamW(params, **shared, accum_steps=args.accum_steps, compile=False),
    }
    try:
        from decent_dp.optim import AccumAdamW as Theirs  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("decent-dp is not installed: pip install decent-dp==0.2.3 --no-deps")
    else:
        arms["decent-dp AccumAdamW"] = Theirs(params, **shared, accum_iter=args.accum_steps)
    return arms
