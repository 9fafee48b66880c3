"""The learning rate as a pure function of the step."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from config import LRSchedule


def lr_at(step: int, schedule: "LRSchedule", n_steps: int) -> float:
    """Learning rate of a 0-based step: linear warm-up, then cosine to eta_min (Loshchilov & Hutter 2017).

    It is exactly schedule.lr at step warmup_steps - 1, and exactly schedule.eta_min at step n_steps - 1.

    Raises:
        ValueError: warmup_steps is not below n_steps, or step is not in [0, n_steps).
    """
    warmup_steps = schedule.warmup_steps
    if warmup_steps >= n_steps:
        raise ValueError(f"warmup_steps = {warmup_steps} must be below n_steps = {n_steps}")
    if not 0 <= step < n_steps:
        raise ValueError(f"step = {step} is not in [0, {n_steps})")
    if step < warmup_steps:
        return schedule.lr * ((step + 1) / warmup_steps)
    progress = (step + 1 - warmup_steps) / (n_steps - warmup_steps)  # (0, 1]
    return schedule.eta_min + (schedule.lr - schedule.eta_min) * 0.5 * (1 + math.cos(math.pi * progress))
