"""AccumAdamW: AdamW whose moments move once per window of accum_steps steps, with the window-mean gradient.

For decentralized training: a worker's own gradient is n times noisier in variance than the mean over n workers, so
its moments average over time what All-Reduce averages over workers. Parameters move in every step; this is not
gradient accumulation. Source: "From Promise to Practice: Realizing High-performance Decentralized Training" (ICLR
2025, arXiv 2410.11998).
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT


class AccumAdamW(Optimizer):
    """AccumAdamW with decoupled weight decay; accum_steps, the window of the moments, counts optimizer steps.

    accum_steps = 1 is AdamW. State of a parameter: step (int), and exp_avg, exp_avg_sq and accum_grad of its shape and
    dtype. A parameter without a gradient is left alone, its step does not move.

    Raises:
        ValueError: lr, eps or weight_decay is negative, a beta is not in [0, 1), or accum_steps is below 1.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        accum_steps: int = 8,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "accum_steps": accum_steps}
        super().__init__(params, defaults)
        for group in self.param_groups:
            _check(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step on every parameter that has a gradient; returns what the closure returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_step: dict[int, list[Tensor]] = defaultdict(list)  # parameters that were skipped before lag behind
            for p in group["params"]:
                if p.grad is not None:
                    by_step[self._advance(p)].append(p)
            for step, params in by_step.items():
                states = [self.state[p] for p in params]
                accum_adamw_(
                    params,
                    [p.grad for p in params if p.grad is not None],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    [state["accum_grad"] for state in states],
                    step=step,
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    accum_steps=group["accum_steps"],
                )
        return loss

    def _advance(self, p: Tensor) -> int:
        """The number of the step that p is about to make, counted from 1; creates its state before the first."""
        state = self.state[p]
        if not state:
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_sq", "accum_grad"):
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state["step"] += 1
        return state["step"]


def accum_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    accum_grads: list[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    accum_steps: int,
) -> None:
    """Makes step number `step` (from 1) of AccumAdamW on every parameter, in place; grads are only read.

    With p, g, m, v, a the i-th entries of the five lists, s = accum_steps and k = ceil(step / s):

        p *= 1 - lr*wd
        a += g / s
        M  = b1*m + (1-b1)*g ;  V = b2*v + (1-b2)*g*g
        p -= lr/(1-b1^k) * M / ( sqrt(V)/sqrt(1-b2^k) + eps )
        if step % s == 0:  m = b1*m + (1-b1)*a ;  v = b2*v + (1-b2)*a*a ;  a = 0
    """
    beta1, beta2 = betas
    k = math.ceil(step / accum_steps)  # bias correction counts windows, not steps

    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_add_(accum_grads, grads, alpha=1 / accum_steps)

    # The frozen moments with the current gradient, for this step only.
    numerators = torch._foreach_mul(exp_avgs, beta1)
    torch._foreach_add_(numerators, grads, alpha=1 - beta1)
    denominators = torch._foreach_mul(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(denominators, grads, grads, value=1 - beta2)

    torch._foreach_sqrt_(denominators)
    torch._foreach_div_(denominators, math.sqrt(1 - beta2**k))
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(params, numerators, denominators, value=-lr / (1 - beta1**k))

    if step % accum_steps == 0:
        torch._foreach_mul_(exp_avgs, beta1)
        torch._foreach_add_(exp_avgs, accum_grads, alpha=1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, accum_grads, accum_grads, value=1 - beta2)
        torch._foreach_zero_(accum_grads)


def _check(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name} = {group[name]} must not be negative")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas = {group['betas']} must be in [0, 1)")
    if group["accum_steps"] < 1:
        raise ValueError(f"accum_steps = {group['accum_steps']} must be at least 1")
