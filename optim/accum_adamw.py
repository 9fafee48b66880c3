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
from torch.optim.optimizer import Optimizer, ParamsT

from optim.accum_kernels import Row, Scalars, update_


class AccumAdamW(Optimizer):
    """AccumAdamW with decoupled weight decay; accum_steps, the window of the moments, counts optimizer steps.

    accum_steps = 1 is AdamW. State of a parameter: step (int), and exp_avg, exp_avg_sq and accum_grad of its shape and
    dtype. A parameter without a gradient is left alone, its step does not move. compile lets torch.compile make the
    kernel, where it can, which takes seconds in the first step of a process; the log says what is used.

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
        *,
        compile: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "accum_steps": accum_steps}
        super().__init__(params, defaults)
        self._compile = compile  # not in the groups: a checkpoint must not decide it
        for group in self.param_groups:
            _check(group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_compile": self._compile}  # Optimizer names what it copies

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step on every parameter that has a gradient; returns what the closure returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_step: dict[int, list[Row]] = defaultdict(list)  # parameters that were skipped before lag behind
            for p in group["params"]:
                if p.grad is not None:
                    state = self._advance(p)
                    row = Row(p.detach(), p.grad, state["exp_avg"], state["exp_avg_sq"], state["accum_grad"])
                    by_step[state["step"]].append(row)
            for step, rows in by_step.items():
                accum_adamw_(
                    rows,
                    step=step,
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    accum_steps=group["accum_steps"],
                    compile=self._compile,
                )
        return loss

    def _advance(self, p: torch.Tensor) -> dict[str, Any]:
        """The state of p, whose step is now the one that p is about to make, counted from 1."""
        state = self.state[p]
        if not state:
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_sq", "accum_grad"):
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state["step"] += 1
        return state


def accum_adamw_(
    rows: list[Row],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    accum_steps: int,
    compile: bool,
) -> None:
    """Makes step number `step` (from 1) of AccumAdamW on every parameter, in place; gradients are only read.

    With p, g, m, v, a the tensors of a row, s = accum_steps and k = ceil(step / s):

        p *= 1 - lr*wd
        a += g / s
        M  = b1*m + (1-b1)*g ;  V = b2*v + (1-b2)*g*g
        p -= lr/(1-b1^k) * M / ( sqrt(V)/sqrt(1-b2^k) + eps )
        if step % s == 0:  m = b1*m + (1-b1)*a ;  v = b2*v + (1-b2)*a*a ;  a = 0
    """
    beta1, beta2 = betas
    k = math.ceil(step / accum_steps)  # bias correction counts windows, not steps
    scalars = Scalars(
        decay=1 - lr * weight_decay,
        share=1 / accum_steps,
        beta1=beta1,
        beta2=beta2,
        new1=1 - beta1,
        new2=1 - beta2,
        eps=eps,
        step_size=lr / (1 - beta1**k),
        correction2=math.sqrt(1 - beta2**k),
    )
    update_(rows, scalars, ends_window=step % accum_steps == 0, compile=compile)


def _check(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name} = {group[name]} must not be negative")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas = {group['betas']} must be in [0, 1)")
    if group["accum_steps"] < 1:
        raise ValueError(f"accum_steps = {group['accum_steps']} must be at least 1")
