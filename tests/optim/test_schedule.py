"""The learning rate: exact values at the ends and at the joint, and the shape between them."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import LRSchedule
from optim import lr_at


@st.composite
def schedules(draw: st.DrawFn, min_warmup: int = 0) -> tuple[LRSchedule, int]:
    warmup_steps = draw(st.integers(min_warmup, 50))
    n_steps = draw(st.integers(warmup_steps + 1, 200))
    lr = draw(st.floats(1e-6, 1.0))
    return LRSchedule(lr=lr, warmup_steps=warmup_steps, eta_min=lr * draw(st.floats(0, 1))), n_steps


@given(schedules(min_warmup=1))
def test_warmup_ends_with_exactly_lr(case: tuple[LRSchedule, int]) -> None:
    schedule, n_steps = case
    assert lr_at(schedule.warmup_steps - 1, schedule, n_steps) == schedule.lr


@given(schedules())
def test_last_step_has_exactly_eta_min(case: tuple[LRSchedule, int]) -> None:
    schedule, n_steps = case
    assert lr_at(n_steps - 1, schedule, n_steps) == schedule.eta_min


@given(schedules())
def test_the_rate_rises_in_the_warmup_and_never_later(case: tuple[LRSchedule, int]) -> None:
    schedule, n_steps = case
    lrs = [lr_at(step, schedule, n_steps) for step in range(n_steps)]
    warmup = lrs[: schedule.warmup_steps]
    after = lrs[max(schedule.warmup_steps - 1, 0) :]
    ulp = 1e-15 * schedule.lr  # the cosine formula rounds
    assert all(a < b for a, b in pairwise(warmup))
    assert all(a >= b - ulp for a, b in pairwise(after))
    assert all(0 < lr <= schedule.lr + ulp for lr in warmup)
    assert all(schedule.eta_min <= lr <= schedule.lr + ulp for lr in after)


@given(schedules())
def test_neighbouring_steps_differ_by_at_most_the_steepest_slope(case: tuple[LRSchedule, int]) -> None:
    # so it is continuous at the joint; a cosine's steepest slope is pi/2 times its mean slope
    schedule, n_steps = case
    lrs = [lr_at(step, schedule, n_steps) for step in range(n_steps)]
    decay = (schedule.lr - schedule.eta_min) * 1.571 / (n_steps - schedule.warmup_steps)
    rise = schedule.lr / schedule.warmup_steps if schedule.warmup_steps else 0.0
    ulp = 1e-15 * schedule.lr  # the cosine formula rounds
    assert all(abs(a - b) <= max(rise, decay) * (1 + 1e-9) + ulp for a, b in pairwise(lrs))


def test_the_middle_of_the_cosine_is_the_mean_of_both_ends() -> None:
    schedule = LRSchedule(lr=6e-4, warmup_steps=2000, eta_min=6e-5)
    assert lr_at(2000 + 500 - 1, schedule, 3000) == pytest.approx(3.3e-4, rel=1e-12)


@pytest.mark.parametrize("step", [-1, 100])
def test_a_step_outside_the_run_is_an_error(step: int) -> None:
    with pytest.raises(ValueError, match=rf"step = {step} is not in \[0, 100\)"):
        lr_at(step, LRSchedule(warmup_steps=10), 100)


def test_a_warmup_as_long_as_the_run_is_an_error() -> None:
    with pytest.raises(ValueError, match="warmup_steps = 100 must be below n_steps = 100"):
        lr_at(0, LRSchedule(warmup_steps=100), 100)
