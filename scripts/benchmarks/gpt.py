"""The GPT that benchmarks train, with its options."""

import argparse
from typing import TYPE_CHECKING

from scripts.lab.options import whole

if TYPE_CHECKING:
    from model import GPT


def add_gpt_arguments(parser: argparse.ArgumentParser, *, n_layers: int, n_embd: int, vocab_size: int) -> None:
    parser.add_argument("--n-layers", type=whole(1), default=n_layers)
    parser.add_argument("--n-embd", type=whole(4, step=4), default=n_embd, help="a multiple of 4")
    parser.add_argument("--vocab-size", type=whole(1, 2**16), default=vocab_size)
    parser.add_argument("--context-length", type=whole(16), default=128)  # the model of small tensors reads 16


def build_gpt(args: argparse.Namespace) -> "GPT":
    from config import ModelConfig
    from model import GPT

    cfg = ModelConfig(n_layers=args.n_layers, n_heads=4, n_embd=args.n_embd, vocab_size=args.vocab_size)
    return GPT(cfg, args.context_length)
