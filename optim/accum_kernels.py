"""How AccumAdamW's update passes over memory; the formula is accum_adamw_'s.

An update is bound by memory traffic, so it reads and writes each tensor once: in a kernel that torch.compile makes of
the formula, or, where there is no compiler, by foreach operations on pieces that fit the processor's cache.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from loguru import logger
from torch import Tensor

# Smaller tensors are updated together by foreach operations: a call of the kernel alone takes 20 us (measured).
KERNEL_MIN_NUMEL = 4096
# Of the parameters in one batch of foreach operations; they allocate twice as much. On the CPU the five tensors and
# the two temporaries must fit the cache: 2^18 to 2^20 are 10x faster than no limit. On a GPU launches cost more.
BATCH_BYTES = {"cpu": 2**19}
BATCH_BYTES_ELSEWHERE = 2**24


class Row(NamedTuple):
    """What belongs to one parameter, or to the same piece of each: five tensors of one shape."""

    p: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    accum_grad: Tensor


class Scalars(NamedTuple):
    """The numbers of one step."""

    decay: float  # 1 - lr*wd
    share: float  # 1/s
    beta1: float
    beta2: float
    new1: float  # 1 - b1
    new2: float  # 1 - b2
    eps: float
    step_size: float  # lr / (1 - b1^k)
    correction2: float  # sqrt(1 - b2^k)


def update_(rows: list[Row], scalars: Scalars, *, ends_window: bool, compile: bool) -> None:
    """One step of every row, in place; `compile` allows kernels of torch.compile. Gradients are only read."""
    numbers: dict[torch.device, Tensor] = {}
    others: list[Row] = []
    for row in rows:
        device, done = row.p.device, False
        suits = row.p.numel() >= KERNEL_MIN_NUMEL and _are_contiguous(row)
        if suits and _kernel_works(compile, device.type, row.p.dtype):
            if device not in numbers:
                numbers[device] = _on_device(scalars, device)
            done = _compiled(ends_window)(*(t.view(-1) for t in row), numbers[device])
        if not done:
            others.append(row)
    for batch in _batches(others):
        _foreach_(batch, scalars, ends_window=ends_window)


def _on_device(scalars: Scalars, device: torch.device) -> Tensor:
    """One tensor: a Python number would be compiled into the kernel, or cost more in each call, as many tensors do."""
    on_gpu = device.type == "cuda"  # pinned memory is copied without a wait for the GPU
    return torch.tensor(scalars, dtype=torch.float64, device="cpu", pin_memory=on_gpu).to(device, non_blocking=True)


@functools.cache
def _kernel_works(compile: bool, device_type: str, dtype: torch.dtype) -> bool:
    """Whether torch.compile makes kernels here: tried out once. Says in the log what is used, and why."""
    reason = "compile = False" if not compile else _try_kernels(device_type, dtype)
    how = f"foreach operations, since {reason}" if reason else "one compiled kernel per tensor"
    logger.info(f"AccumAdamW: {how} ({device_type}, {str(dtype).removeprefix('torch.')})")
    return reason is None


def _try_kernels(device_type: str, dtype: torch.dtype) -> str | None:
    """Why there are none, or None."""
    try:
        row = [torch.zeros(KERNEL_MIN_NUMEL, dtype=dtype, device=device_type) for _ in Row._fields]
        numbers = _on_device(Scalars(*(1.0 for _ in Scalars._fields)), row[0].device)
        compiled = all(_compiled(ends_window)(*row, numbers) for ends_window in (False, True))
    except Exception as error:  # whatever a missing or broken compiler leads to
        return f"torch.compile fails: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
    return None if compiled else "torch.compile is switched off"


@functools.cache
def _compiled(ends_window: bool) -> Callable[..., bool]:
    # Not at import, which this makes slow. dynamic: one kernel for all sizes.
    return torch.compile(_step_and_end_window_ if ends_window else _step_, dynamic=True)


def _step_(p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, accum_grad: Tensor, numbers: Tensor) -> bool:
    """A step on 1-D tensors; numbers are the Scalars, and the computation is in p's dtype.

    Returns False and does nothing where torch.compile does not compile it.
    """
    if not torch.compiler.is_compiling():
        return False
    decay, share, beta1, beta2, new1, new2, eps, step_size, correction2 = numbers.unbind()
    numerator = beta1 * exp_avg + new1 * grad
    denominator = (beta2 * exp_avg_sq + new2 * grad * grad).sqrt() / correction2 + eps
    p.mul_(decay).sub_(step_size * numerator / denominator)
    accum_grad.add_(share * grad)
    return True


def _step_and_end_window_(
    p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, accum_grad: Tensor, numbers: Tensor
) -> bool:
    """_step_, after which the moments move and a new window begins."""
    if not _step_(p, grad, exp_avg, exp_avg_sq, accum_grad, numbers):
        return False
    _, _, beta1, beta2, new1, new2, *_ = numbers.unbind()
    exp_avg.mul_(beta1).add_(new1 * accum_grad)
    exp_avg_sq.mul_(beta2).add_(new2 * accum_grad * accum_grad)
    accum_grad.zero_()
    return True


def _are_contiguous(row: Row) -> bool:
    return all(t.is_contiguous() for t in row)


def _batches(rows: list[Row]) -> Iterator[list[Row]]:
    """All elements of the rows, in batches of at most BATCH_BYTES: a large tensor is cut, small ones are put together.

    A tensor that is not contiguous is not cut.
    """
    batch: list[Row] = []
    batch_bytes = 0
    for row in rows:
        cap_bytes = BATCH_BYTES.get(row.p.device.type, BATCH_BYTES_ELSEWHERE)
        pieces = [row]
        if row.p.nbytes > cap_bytes and _are_contiguous(row):
            cap_numel = cap_bytes // row.p.element_size()
            cut = [t.view(-1).split(cap_numel) for t in row]
            pieces = [Row(*(ts[i] for ts in cut)) for i in range(len(cut[0]))]
        for piece in pieces:
            if batch and batch_bytes + piece.p.nbytes > cap_bytes:
                yield batch
                batch, batch_bytes = [], 0
            batch.append(piece)
            batch_bytes += piece.p.nbytes
    if batch:
        yield batch


def _foreach_(batch: list[Row], x: Scalars, *, ends_window: bool) -> None:
    """One step of a batch; allocates twice its parameters."""
    params, grads, exp_avgs, exp_avg_sqs, accum_grads = ([row[i] for row in batch] for i in range(len(Row._fields)))
    torch._foreach_mul_(params, x.decay)
    torch._foreach_add_(accum_grads, grads, alpha=x.share)

    numerators = torch._foreach_mul(exp_avgs, x.beta1)
    torch._foreach_add_(numerators, grads, alpha=x.new1)
    denominators = torch._foreach_mul(exp_avg_sqs, x.beta2)
    torch._foreach_addcmul_(denominators, grads, grads, value=x.new2)
    torch._foreach_sqrt_(denominators)
    torch._foreach_div_(denominators, x.correction2)
    torch._foreach_add_(denominators, x.eps)
    torch._foreach_addcdiv_(params, numerators, denominators, value=-x.step_size)

    if ends_window:
        torch._foreach_mul_(exp_avgs, x.beta1)
        torch._foreach_add_(exp_avgs, accum_grads, alpha=x.new1)
        torch._foreach_mul_(exp_avg_sqs, x.beta2)
        torch._foreach_addcmul_(exp_avg_sqs, accum_grads, accum_grads, value=x.new2)
        torch._foreach_zero_(accum_grads)
