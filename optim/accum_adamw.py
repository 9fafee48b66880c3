"""AccumAdamW: AdamW whose moments move once per window of accum_steps steps, with the window-mean gradient.

For decentralized training: a worker's own gradient is n times noisier in variance than the mean over n workers, so
its moments average over time what All-Reduce averages over workers. Parameters move in every step; this is not
gradient accumulation. Source: "From Promise to Practice: Realizing High-performance Decentralized Training" (ICLR
2025, arXiv 2410.11998).

accum_adamw_ is the formula. Memory traffic bounds its speed: torch.compile makes one pass over memory of it; without
a compiler it runs as it stands, on pieces that stay in the processor's cache from one operation to the next.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from loguru import logger
from torch import Tensor
from torch.fx.experimental import _config as shape_config
from torch.optim.optimizer import Optimizer, ParamsT

ROWS_PER_CALL = 8  # tensors of a compiled call, which takes 15 to 30 us beside them: one row was 5 to 18% slower
COMPILE_MIN_NUMEL = 4096  # models without a tensor of this size are not worth the compiler's start
PIECE_NUMEL = 2**16  # elements of an eager piece on the CPU; 2**14 and 2**19 were half as fast
GPU_PIECE_NUMEL = 2**22  # on a GPU launches cost more than memory traffic


class Row(NamedTuple):
    """Tensors of one parameter, or the same piece of each; all have one shape."""

    p: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    accum_grad: Tensor


class Scalars(NamedTuple):
    """Numbers of one step: floats, or tensors without dimensions, which torch.compile does not compile in."""

    decay: float | Tensor  # 1 - lr*wd
    share: float | Tensor  # 1/s
    beta1: float | Tensor
    beta2: float | Tensor
    new1: float | Tensor  # 1 - b1
    new2: float | Tensor  # 1 - b2
    eps: float | Tensor
    step_size: float | Tensor  # lr / (1 - b1^k)
    correction2: float | Tensor  # sqrt(1 - b2^k)


def accum_adamw_(row: Row, x: Scalars, *, ends_window: bool) -> None:
    """Make one step of AccumAdamW in place.

    Observed in float32 on a CPU: compiled and eager moments have the same bits; parameters differ in the last bits,
    since eager sqrt was not correctly rounded in a fifth of the elements.
    """
    p, grad, exp_avg, exp_avg_sq, accum_grad = row
    p.mul_(x.decay)
    accum_grad.add_(x.share * grad)
    m = (x.beta1 * exp_avg).add_(x.new1 * grad)  # temporary: frozen moments and the current gradient
    v = (x.beta2 * exp_avg_sq).add_((x.new2 * grad).mul_(grad))
    p.sub_(m.mul_(x.step_size).div_(v.sqrt_().div_(x.correction2).add_(x.eps)))
    if ends_window:
        exp_avg.mul_(x.beta1).add_(x.new1 * accum_grad)
        exp_avg_sq.mul_(x.beta2).add_((x.new2 * accum_grad).mul_(accum_grad))
        accum_grad.zero_()


class AccumAdamW(Optimizer):
    """AccumAdamW with decoupled weight decay; accum_steps, the window of the moments, counts optimizer steps.

    accum_steps = 1 is AdamW. State of a parameter: step (int), and exp_avg, exp_avg_sq and accum_grad of its shape and
    dtype. A parameter without a gradient is left alone, its step does not move. compile allows torch.compile, which
    takes seconds in the first step of a process; the log says what is used.

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
        """Make one step on every parameter that has a gradient. Return the closure's loss, or None."""
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
                ends_window = step % group["accum_steps"] == 0
                _update_(rows, _scalars(group, step), ends_window=ends_window, compile=self._compile)
        return loss

    def _advance(self, p: Tensor) -> dict[str, Any]:
        """Return the state of p, whose step now counts the coming step, from 1."""
        state = self.state[p]
        if not state:
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_sq", "accum_grad"):
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state["step"] += 1
        return state


def _scalars(group: dict[str, Any], step: int) -> Scalars:
    lr, (beta1, beta2) = group["lr"], group["betas"]
    k = math.ceil(step / group["accum_steps"])  # bias correction counts windows, not steps
    return Scalars(
        decay=1 - lr * group["weight_decay"],
        share=1 / group["accum_steps"],
        beta1=beta1,
        beta2=beta2,
        new1=1 - beta1,
        new2=1 - beta2,
        eps=group["eps"],
        step_size=lr / (1 - beta1**k),
        correction2=math.sqrt(1 - beta2**k),
    )


def _update_(rows: list[Row], scalars: Scalars, *, ends_window: bool, compile: bool) -> None:
    """Update all rows: contiguous ones in compiled calls, where there is a compiler, all others eagerly."""
    for_compiler: dict[tuple[torch.device, torch.dtype], list[Row]] = defaultdict(list)
    others = []
    is_large = any(row.p.numel() >= COMPILE_MIN_NUMEL for row in rows)
    for row in rows:
        if is_large and _is_contiguous(row) and _compiles(compile, row.p.device, row.p.dtype):
            for_compiler[row.p.device, row.p.dtype].append(row)
        else:
            others.append(row)
    for members in for_compiler.values():
        _run_compiled_(members, scalars, ends_window)
    update_rows_(others, scalars, ends_window)


def update_rows_(rows: list[Row], scalars: Scalars | Tensor, ends_window: bool) -> bool:
    """Update all rows, in pieces unless torch.compile compiles this. Return whether it does."""
    compiled = torch.compiler.is_compiling()
    x = Scalars(*scalars)
    for row in rows:
        for piece in [row] if compiled else _pieces(row):
            accum_adamw_(piece, x, ends_window=ends_window)
    return compiled


def _pieces(row: Row) -> Iterator[Row]:
    """Yield all elements of a row in pieces; a tensor that is not contiguous is not cut."""
    numel = PIECE_NUMEL if row.p.is_cpu else GPU_PIECE_NUMEL
    if row.p.numel() <= numel or not _is_contiguous(row):
        yield row
    else:
        yield from map(Row, *(t.view(-1).split(numel) for t in row))


def _is_contiguous(row: Row) -> bool:
    return all(t.is_contiguous() for t in row)


def _run_compiled_(rows: list[Row], scalars: Scalars, ends_window: bool) -> bool:
    """Update contiguous rows of one device and dtype. Return whether torch.compile compiled this."""
    device, dtype = rows[0].p.device, rows[0].p.dtype
    on_gpu = device.type == "cuda"  # pinned memory is copied without a wait for the GPU
    # One tensor: Python numbers would be compiled in, or cost more in each call, as many tensors do.
    numbers = torch.tensor(scalars, dtype=torch.float64, pin_memory=on_gpu).to(device, non_blocking=True)
    compiled = True
    # One kernel for all sizes, for 0 and 1 and equal ones too, and for all places in a flat buffer.
    with shape_config.patch(  # pyright: ignore[reportAttributeAccessIssue]
        backed_size_oblivious=True, use_duck_shape=False
    ):
        for i in range(0, len(rows), ROWS_PER_CALL):
            # .data: without a trace of the tensor that it is a view of, whose shape would be compiled in.
            flat = [Row(*(t.view(-1).data for t in row)) for row in rows[i : i + ROWS_PER_CALL]]
            compiled = _compiled()(flat + _padding(device, dtype)[len(flat) :], numbers, ends_window)
    torch.autograd.graph.increment_version([row.p for row in rows])
    return compiled


@functools.cache
def _compiled() -> Callable[[list[Row], Tensor, bool], bool]:
    # Not at import, which this makes slow. dynamic_threads: or the kernel has as many threads as its first sizes need.
    return torch.compile(update_rows_, dynamic=True, options={"cpp.dynamic_threads": True})


@functools.cache
def _padding(device: torch.device, dtype: torch.dtype) -> list[Row]:
    """Dummy rows that fill a call up: torch.compile specialises on the length of a list."""
    numel = 1024  # on a GPU, the compiler fits the size of a block to the first rows, which are these
    return [Row(*(torch.zeros(numel, dtype=dtype, device=device) for _ in Row._fields)) for _ in range(ROWS_PER_CALL)]


@functools.cache
def _compiles(compile: bool, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch.compile works here, and log why not; both kernels are compiled now, on dummies."""
    reason = "compile = False"
    if compile:
        try:
            ones = Scalars(*(1.0 for _ in Scalars._fields))
            works = all(_run_compiled_(_padding(device, dtype), ones, ends) for ends in (False, True))
            reason = "" if works else "torch.compile is switched off"
        except Exception as error:  # whatever a missing or broken compiler leads to
            reason = f"torch.compile fails: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
    how = f"eager, since {reason}" if reason else "compiled"
    logger.info(f"AccumAdamW: {how} ({device.type}, {str(dtype).removeprefix('torch.')})")
    return not reason


def _check(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name} = {group[name]} must not be negative")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas = {group['betas']} must be in [0, 1)")
    if group["accum_steps"] < 1:
        raise ValueError(f"accum_steps = {group['accum_steps']} must be at least 1")
