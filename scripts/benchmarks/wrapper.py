"""bench.py wrapper: a training step of one worker in DecentDP against the bare model, for two kinds of models."""

import argparse
import functools

import torch
from torch import Tensor, nn

from decent import DecentDP, World
from scripts.benchmarks.gpt import build_gpt, training_step
from scripts.benchmarks.timing import Arms, Result, alternate, compare


def measure(args: argparse.Namespace) -> list[Result]:
    """Return ms per training step (forward, backward, clipping, AdamW) of each model, bare and in DecentDP."""
    world = World.from_env()
    tokens = torch.randint(args.vocab_size, (2, args.context_length), device=world.device)
    adamw = functools.partial(torch.optim.AdamW, lr=1e-4, fused=True)
    rows = []
    with world.connected():
        for name, build in {"GPT": build_gpt, "small tensors": SmallTensors}.items():
            bare, inside = build(args).to(world.device), build(args).to(world.device)
            dp = DecentDP(inside, "complete", local_world_size=1)
            arms: Arms = {
                f"{name}, bare": training_step(bare, None, adamw(bare.parameters()), tokens),
                f"{name}, in DecentDP": training_step(inside, dp, adamw(inside.parameters()), tokens),
            }
            rows += compare(alternate(arms, args.rounds, per_block=args.steps), base=f"{name}, bare")
    return rows


class SmallTensors(nn.Module):
    """Many 16 x 16 matrices, with the arguments and results of a GPT."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(args.small_tensors))

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[None, Tensor]:
        x = (idx + targets)[..., :16].float()
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return None, x.square().mean()
