"""AccumAdamW against the formula, torch's AdamW and a step computed by hand; its state and its manners."""

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from optim import AccumAdamW


def scalar_reference(
    p: float, grads: list[float], lrs: list[float], betas: tuple[float, float], eps: float, wd: float, s: int
) -> float:
    """One parameter through all steps in Python floats, written from the formula."""
    b1, b2 = betas
    t = 0
    m = v = a = 0.0
    for g, lr in zip(grads, lrs, strict=True):
        t += 1
        k = math.ceil(t / s)
        p *= 1 - lr * wd
        a += g / s
        M = b1 * m + (1 - b1) * g
        V = b2 * v + (1 - b2) * g * g
        p -= lr / (1 - b1**k) * M / (math.sqrt(V) / math.sqrt(1 - b2**k) + eps)
        if t % s == 0:
            m = b1 * m + (1 - b1) * a
            v = b2 * v + (1 - b2) * a * a
            a = 0.0
    return p


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], grads: list[list[Tensor]]) -> None:
    for grads_of_step in grads:
        for p, g in zip(params, grads_of_step, strict=True):
            p.grad = g.clone()
        optimizer.step()


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    shapes = draw(st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=3))
    n_steps = draw(st.integers(1, 11))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return {
        "params": [rng.normal(size=shape) for shape in shapes],
        "grads": [[rng.normal(size=shape) for shape in shapes] for _ in range(n_steps)],
        "lrs": rng.uniform(0, 0.1, size=n_steps).tolist(),
        "betas": (draw(st.sampled_from([0.0, 0.5, 0.9])), draw(st.sampled_from([0.0, 0.95, 0.98]))),
        "eps": draw(st.sampled_from([1e-8, 1e-3])),
        "wd": draw(st.sampled_from([0.0, 0.1])),
        "s": draw(st.integers(1, 5)),
    }


# float32: a step of size lr <= 0.1 has a relative error of some 1e-7, 11 of them stay below 3e-6.
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-12, 1e-13), (torch.float32, 3e-6, 3e-6)])
@given(run=runs())
@settings(max_examples=60, deadline=None)
def test_equals_the_formula_in_every_element(dtype: torch.dtype, rtol: float, atol: float, run: dict[str, Any]) -> None:
    params = [nn.Parameter(torch.tensor(p, dtype=dtype)) for p in run["params"]]
    optimizer = AccumAdamW(params, betas=run["betas"], eps=run["eps"], weight_decay=run["wd"], accum_steps=run["s"])
    for lr, grads in zip(run["lrs"], run["grads"], strict=True):
        optimizer.param_groups[0]["lr"] = lr
        train(optimizer, params, [[torch.tensor(g, dtype=dtype) for g in grads]])
    for i, (p, start) in enumerate(zip(params, run["params"], strict=True)):
        expected = np.empty_like(start)
        for at in np.ndindex(start.shape):
            grads = [float(grads_of_step[i][at]) for grads_of_step in run["grads"]]
            expected[at] = scalar_reference(
                float(start[at]), grads, run["lrs"], run["betas"], run["eps"], run["wd"], run["s"]
            )
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=rtol, atol=atol)


def normal_run(n_steps: int, dtype: torch.dtype = torch.float64) -> tuple[list[nn.Parameter], list[list[Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2), (5,), ()]
    params = [nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator)) for shape in shapes]
    grads = [[torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes] for _ in range(n_steps)]
    return params, grads


def test_a_window_of_one_step_is_adamw() -> None:
    ours, grads = normal_run(20)
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    train(AccumAdamW(ours, lr=0.01, weight_decay=0.1, accum_steps=1), ours, grads)
    train(torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.98), weight_decay=0.1), theirs, grads)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # the same formula in another order


def test_three_steps_by_hand() -> None:
    # s = 2, b1 = b2 = 1/2, lr = 1, wd = 0, eps = 0, p = 0, g = 2, 4, 3
    # t=1 k=1  a = 1  M = 1             V = 2              p -= 2 * 1 / sqrt(4)        -> -1
    # t=2 k=1  a = 3  M = 2             V = 8              p -= 2 * 2 / sqrt(16)       -> -2
    #          then m = 3/2, v = 9/2, a = 0
    # t=3 k=2  M = 3/4 + 3/2 = 9/4      V = 9/4 + 9/2 = 27/4, over 3/4: 9  p -= 4/3 * 9/4 / 3  -> -3
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = AccumAdamW([p], lr=1.0, betas=(0.5, 0.5), eps=0.0, weight_decay=0.0, accum_steps=2)
    seen = []
    for g in (2.0, 4.0, 3.0):
        train(optimizer, [p], [[torch.tensor([g], dtype=torch.float64)]])
        seen.append(p.item())
    assert seen == pytest.approx([-1, -2, -3], rel=1e-14)


def test_parameters_move_in_every_step_and_moments_once_a_window() -> None:
    params, grads = normal_run(9)
    optimizer = AccumAdamW(params, accum_steps=3)
    for step, grads_of_step in enumerate(grads, start=1):
        before = [(p.detach().clone(), optimizer.state[p].get("exp_avg", torch.zeros_like(p)).clone()) for p in params]
        train(optimizer, params, [grads_of_step])
        for p, (old_p, old_exp_avg) in zip(params, before, strict=True):
            assert not torch.equal(p, old_p)
            assert torch.equal(optimizer.state[p]["exp_avg"], old_exp_avg) == (step % 3 != 0)


def test_gradients_are_only_read() -> None:
    params, grads = normal_run(1)
    train(AccumAdamW(params, accum_steps=1), params, grads)
    for p, g in zip(params, grads[0], strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, g)


def test_saved_in_the_middle_of_a_window_and_loaded_it_continues_bit_by_bit() -> None:
    params, grads = normal_run(11, torch.float32)
    optimizer = AccumAdamW(params, accum_steps=3)
    train(optimizer, params, grads[:4])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded_params = [nn.Parameter(p.detach().clone()) for p in params]
    loaded = AccumAdamW(loaded_params, lr=1.0, accum_steps=7)  # the saved values replace these
    loaded.load_state_dict(torch.load(file, weights_only=True))
    train(optimizer, params, grads[4:])
    train(loaded, loaded_params, grads[4:])
    assert all(torch.equal(a, b) for a, b in zip(params, loaded_params, strict=True))


def test_a_parameter_that_joins_late_starts_its_own_window() -> None:
    params, grads = normal_run(5)
    late = params[0]
    alone = nn.Parameter(late.detach().clone())
    optimizer = AccumAdamW(params, accum_steps=2)
    for step, grads_of_step in enumerate(grads):
        for p, g in zip(params, grads_of_step, strict=True):
            p.grad = None if p is late and step == 0 else g
        optimizer.step()
        if step == 0:
            assert torch.equal(late, alone)
            assert late not in optimizer.state
    train(AccumAdamW([alone], accum_steps=2), [alone], [[grads_of_step[0]] for grads_of_step in grads[1:]])
    assert torch.equal(late, alone)


def test_every_group_has_its_own_values() -> None:
    (decays, stays, _), _ = normal_run(0)
    start = decays.detach().clone(), stays.detach().clone()
    optimizer = AccumAdamW([{"params": [decays]}, {"params": [stays], "weight_decay": 0.0}], lr=0.5, weight_decay=0.2)
    train(optimizer, [decays, stays], [[torch.zeros_like(decays), torch.zeros_like(stays)]])
    torch.testing.assert_close(decays, start[0] * 0.9, rtol=1e-15, atol=0)
    assert torch.equal(stays, start[1])


def test_parameters_may_be_views_of_one_buffer() -> None:
    params, grads = normal_run(5)
    flat = torch.cat([p.detach().flatten() for p in params])
    views = []
    for p, chunk in zip(params, flat.split([p.numel() for p in params]), strict=True):
        views.append(nn.Parameter(torch.empty_like(p)))
        views[-1].data = chunk.view_as(p)
    train(AccumAdamW(params, accum_steps=2), params, grads)
    train(AccumAdamW(views, accum_steps=2), views, grads)
    assert torch.equal(flat, torch.cat([p.detach().flatten() for p in params]))


def test_the_closure_computes_the_gradient_and_its_loss_is_returned() -> None:
    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = AccumAdamW([p], lr=0.1, weight_decay=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert p.item() == pytest.approx(2.9)  # the first step is lr * sign(g)


def test_a_loss_scaler_unscales_and_skips() -> None:
    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = AccumAdamW([p], lr=0.1, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, expected in [(1.0, 2.9), (math.inf, 2.9)]:
        optimizer.zero_grad()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert p.item() == pytest.approx(expected)
    assert optimizer.state[p]["accum_grad"].item() == pytest.approx(1 / 8)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("lr", -1e-3),
        ("lr", math.nan),
        ("betas", (1.0, 0.98)),
        ("betas", (0.9, -0.1)),
        ("eps", -1e-8),
        ("weight_decay", -0.1),
        ("accum_steps", 0),
    ],
)
def test_a_value_out_of_range_is_an_error_that_names_it(argument: str, value: Any) -> None:
    p = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=argument):
        AccumAdamW([p], **{argument: value})
    with pytest.raises(ValueError, match=argument):
        AccumAdamW([{"params": [p], argument: value}])
