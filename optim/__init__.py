"""Optimizer and learning rate schedule; knows neither the model nor that there are other workers."""

from optim.accum_adamw import AccumAdamW
from optim.factory import build_optimizer
from optim.schedule import lr_at

__all__ = ["AccumAdamW", "build_optimizer", "lr_at"]
