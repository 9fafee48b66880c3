"""The GPT that benchmarks train, and a training step."""

import argparse
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from config import ModelConfig
from decent import DecentDP
from model import GPT


def build_gpt(args: argparse.Namespace) -> GPT:
    cfg = ModelConfig(n_layers=args.n_layers, n_heads=4, n_embd=args.n_embd, vocab_size=args.vocab_size)
    return GPT(cfg, args.context_length)


def training_step(model: nn.Module, dp: DecentDP | None, optimizer: Optimizer, tokens: Tensor) -> Callable[[], None]:
    """Return a function that takes one step on `tokens`, (B, T) int64. None means without DecentDP."""

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
