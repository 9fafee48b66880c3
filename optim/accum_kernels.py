"""How AccumAdamW's update passes over memory; the formula is accum_adamw_'s.

An update is bound by memory traffic, so it reads and writes each tensor once: in a kernel that torch.compile makes of
the formula, or, where there is no compiler, by foreach operations on pieces that fit the processor's cache.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from loguru import logger
from torch import Tensor

# Of one call of the kernel, which alone takes 15 to 30 us, whatever the sizes: one row a call was 5% slower (measured).
ROWS_PER_CALL = 8
KERNEL_MIN_NUMEL = 4096  # smaller tensors are updated by foreach operations: they are not worth the compiler's start
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
    for_kernel: dict[tuple[torch.device, torch.dtype, tuple[bool, ...]], list[Row]] = defaultdict(list)
    others: list[Row] = []
    for row in rows:
        suits = row.p.numel() >= KERNEL_MIN_NUMEL and _are_contiguous(row)
        if suits and _kernel_works(compile, row.p.device.type, row.p.dtype):
            for_kernel[row.p.device, row.p.dtype, _have_offsets(row)].append(row)
        else:
            others.append(row)
    for (device, dtype, have_offsets), members in for_kernel.items():
        numbers = _on_device(scalars, device)
        for i in range(0, len(members), ROWS_PER_CALL):
            part = members[i : i + ROWS_PER_CALL]
            # .data: without a trace of the tensor that it is a view of, whose shape would be compiled in.
            flat = [Row(*(t.view(-1).data for t in row)) for row in part]
            if _compiled(ends_window)(flat + _scratch(device, dtype, have_offsets)[len(part) :], numbers):
                torch.autograd.graph.increment_version([row.p for row in part])
            else:
                others += part
    for batch in _batches(others):
        _foreach_(batch, scalars, ends_window=ends_window)


def _have_offsets(row: Row) -> tuple[bool, ...]:
    """Which tensors start inside their storage, as parameters of a flat buffer do: torch.compile tells 0 apart."""
    p, grad, exp_avg, exp_avg_sq, accum_grad = row  # spelled out: this runs for every parameter in every step
    return (
        p.storage_offset() > 0,
        grad.storage_offset() > 0,
        exp_avg.storage_offset() > 0,
        exp_avg_sq.storage_offset() > 0,
        accum_grad.storage_offset() > 0,
    )


@functools.cache
def _scratch(device: torch.device, dtype: torch.dtype, have_offsets: tuple[bool, ...]) -> list[Row]:
    """Rows that belong to nobody and fill up a call. Their sizes differ, so that none is compiled as another's."""
    rows = []
    for i in range(ROWS_PER_CALL):
        numel = 64 + i
        starts = [128 + 8 * i + j if inside else 0 for j, inside in enumerate(have_offsets)]
        rows.append(Row(*(torch.zeros(s + numel, dtype=dtype, device=device)[s:].data for s in starts)))
    return rows


def _on_device(scalars: Scalars, device: torch.device) -> Tensor:
    """One tensor: a Python number would be compiled into the kernel, or cost more in each call, as many tensors do."""
    on_gpu = device.type == "cuda"  # pinned memory is copied without a wait for the GPU
    return torch.tensor(scalars, dtype=torch.float64, device="cpu", pin_memory=on_gpu).to(device, non_blocking=True)


@functools.cache
def _kernel_works(compile: bool, device_type: str, dtype: torch.dtype) -> bool:
    """Whether torch.compile makes kernels here: tried out once. Says in the log what is used, and why."""
    reason = "compile = False" if not compile else _try_kernels(device_type, dtype)
    how = f"foreach operations, since {reason}" if reason else f"one compiled kernel, {ROWS_PER_CALL} tensors a call"
    logger.info(f"AccumAdamW: {how} ({device_type}, {str(dtype).removeprefix('torch.')})")
    return reason is None


def _try_kernels(device_type: str, dtype: torch.dtype) -> str | None:
    """Why there are none, or None."""
    try:
        rows = _scratch(torch.empty(0, device=device_type).device, dtype, (False,) * len(Row._fields))
        numbers = _on_device(Scalars(*(1.0 for _ in Scalars._fields)), rows[0].p.device)
        compiled = all(_compiled(ends_window)(rows, numbers) for ends_window in (False, True))
    except Exception as error:  # whatever a missing or broken compiler leads to
        return f"torch.compile fails: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
    return None if compiled else "torch.compile is switched off"


@functools.cache
def _compiled(ends_window: bool) -> Callable[[list[Row], Tensor], bool]:
    # Not at import, which this makes slow. dynamic: one kernel for all sizes. dynamic_threads: or the kernel has as
    # many threads as the sizes of the first call are worth, which is one.
    steps_ = _steps_and_end_windows_ if ends_window else _steps_
    return torch.compile(steps_, dynamic=True, options={"cpp.dynamic_threads": True})


def _steps_(rows: list[Row], numbers: Tensor) -> bool:
    """A step on ROWS_PER_CALL rows of 1-D tensors; numbers are the Scalars, and the computation is in p's dtype.

    Returns False and does nothing where torch.compile does not compile it.
    """
    if not torch.compiler.is_compiling():
        return False
    decay, share, beta1, beta2, new1, new2, eps, step_size, correction2 = numbers.unbind()
    for p, grad, exp_avg, exp_avg_sq, accum_grad in rows:
        numerator = beta1 * exp_avg + new1 * grad
        denominator = (beta2 * exp_avg_sq + new2 * grad * grad).sqrt() / correction2 + eps
        p.mul_(decay).sub_(step_size * numerator / denominator)
        accum_grad.add_(share * grad)
    return True


def _steps_and_end_windows_(rows: list[Row], numbers: Tensor) -> bool:
    """_steps_, after which the moments move and a new window begins."""
    if not _steps_(rows, numbers):
        return False
    _, _, beta1, beta2, new1, new2, *_ = numbers.unbind()
    for _, _, exp_avg, exp_avg_sq, accum_grad in rows:
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
