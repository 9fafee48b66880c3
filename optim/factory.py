"""The optimizer that a configuration names, with the parameters in two groups: with and without weight decay."""

from typing import TYPE_CHECKING

from torch import nn
from torch.optim import AdamW, Optimizer

from optim.accum_adamw import AccumAdamW

if TYPE_CHECKING:
    from config import OptimConfig


def build_optimizer(module: nn.Module, cfg: "OptimConfig", lr: float, *, compile: bool = True) -> Optimizer:
    """Return an optimizer with two groups: first matrices and embeddings, which decay, then biases and gains.

    compile concerns AccumAdamW only.
    """
    params = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    if cfg.name == "adamw":
        return AdamW(groups, lr=lr, betas=cfg.betas, eps=cfg.eps, fused=True)
    return AccumAdamW(groups, lr=lr, betas=cfg.betas, eps=cfg.eps, accum_steps=cfg.accum_steps, compile=compile)
