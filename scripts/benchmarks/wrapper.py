"""bench.py wrapper: a training step of one worker in DecentDP against the bare model, for two kinds of models."""

import argparse
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from scripts.benchmarks.gpt import add_gpt_arguments, build_gpt
from scripts.benchmarks.timing import Arms, Result, alternate, compare, repeat
from scripts.lab.options import whole

if TYPE_CHECKING:
    import torch
    from torch import nn

    from decent import DecentDP


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_gpt_arguments(parser, n_layers=6, n_embd=320, vocab_size=8_000)
    parser.add_argument(
        "--small-tensors", type=whole(1), default=600, help="tensors of the second model (default: %(default)s)"
    )
    parser.add_argument("--steps", type=whole(1), default=1, help="steps of a block (default: %(default)s)")
    parser.set_defaults(rounds=50)  # single steps differ by more than the 3% that are looked for


def measure(args: argparse.Namespace) -> list[Result]:
    """Return ms per training step (forward, backward, clipping, AdamW) of each model, bare and in DecentDP."""
    import torch

    from decent import DecentDP, World

    world = World.from_env()
    tokens = torch.randint(args.vocab_size, (2, args.context_length), device=world.device)
    rows = []
    with world.connected():
        for name, build in {"GPT": build_gpt, "small tensors": build_small_tensors}.items():
            bare, inside = build(args).to(world.device), build(args).to(world.device)
            dp = DecentDP(inside, "complete", local_world_size=1)
            steps = {"bare": training_step(bare, None, tokens), "in DecentDP": training_step(inside, dp, tokens)}
            arms: Arms = {f"{name}, {how}": functools.partial(repeat, step, args.steps) for how, step in steps.items()}
            rows += compare(alternate(arms, args.rounds), base=f"{name}, bare", per=args.steps)
    return rows


def training_step(model: "nn.Module", dp: "DecentDP | None", tokens: "torch.Tensor") -> Callable[[], None]:
    """Return a function that takes one step on `tokens`, (B, T) int64. None means without DecentDP."""
    import torch
    from torch.nn.utils import clip_grad_norm_

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        (dp or model)(tokens, tokens)[1].backward()
        clip_grad_norm_(model.parameters(), 1.0)
        if dp is not None:
            dp.mix()
        optimizer.step()
        if dp is not None:
            dp.exchange()

    return step


def build_small_tensors(args: argparse.Namespace) -> "nn.Module":
    """Return a model of many 16 x 16 matrices, with the arguments and results of a GPT."""
    import torch
    from torch import nn

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(args.small_tensors))

        def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> tuple[None, torch.Tensor]:
            x = (idx + targets)[..., :16].float()
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return None, x.square().mean()

    return Small()
