"""A GPT whose computation is emulated, so that workers which share cores do not measure each other.

A layer's forward and backward sleep, then the backward returns ready-made gradients.
"""

import time
from typing import Any

import torch
from torch import Tensor, nn

N_TOKENS = 2048  # rows of the embedding


class EmulatedGPT(nn.Module):
    """An embedding and n_layers blocks with a GPT's parameters, 12 n_embd^2 in each block."""

    def __init__(self, settings: dict[str, Any], gradients: list[list[Tensor]] | None = None) -> None:
        super().__init__()
        c, n_layers = settings["n_embd"], settings["n_layers"]
        block = [(3 * c, c), (c, c), (4 * c, c), (c, 4 * c), (c,), (c,)]
        shapes = [[(N_TOKENS, c)], *[block] * n_layers]
        self.layers = [nn.ParameterList(torch.randn(*shape) * 0.02 for shape in layer) for layer in shapes]
        self.registered = nn.ModuleList(self.layers)
        self.gradients = gradients or []  # by layer; all arms share them
        self.forward_s = settings["compute_ms"] / 1e3 / n_layers / 3  # in one block; a backward costs two forwards
        self.slowness = 1.0  # factor of this worker's computation in this step

    def forward(self, x: Tensor) -> Tensor:
        for i, (layer, gradients) in enumerate(zip(self.layers, self.gradients, strict=True)):
            share = self.slowness if i else 0.0  # the embedding itself costs nothing
            x = _Layer.apply(x, self.forward_s * share, gradients, *layer)
        return x


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, forward_s: float, gradients: list[Tensor], *_: Tensor
    ) -> Tensor:
        ctx.backward_s, ctx.gradients = 2 * forward_s, gradients
        time.sleep(forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        time.sleep(ctx.backward_s)
        # Autograd keeps a new view as p.grad, but would copy a tensor that is referenced elsewhere too.
        return grad, None, None, *[g.view_as(g) for g in ctx.gradients]
