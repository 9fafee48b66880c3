"""AccumAdamW against the formula, torch's AdamW and a step computed by hand; its state and its manners.

Where a test takes the fixture `compile`, it runs compiled and eagerly.
"""

import copy
import io
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_cpp_code

from optim import AccumAdamW, accum_adamw
from scripts.benchmarks.timing import peak_temporary_bytes

# torch's own, when its compiler is imported
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@pytest.fixture(params=[True, False], ids=["compiled", "eager"])
def compile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Choice of the kernel; small tensors too are compiled, and cut into pieces."""
    monkeypatch.setattr(accum_adamw, "COMPILE_MIN_NUMEL", 1)
    monkeypatch.setattr(accum_adamw, "PIECE_NUMEL", 3)
    return request.param


def reference(run: dict[str, Any], i: int) -> np.ndarray:
    """Parameter i after each step in float64, written from the formula."""
    (b1, b2), eps, wd, s = run["betas"], run["eps"], run["wd"], run["s"]
    p = run["params"][i]
    m = v = a = np.zeros_like(p)
    path = []
    for t, (grads, lr) in enumerate(zip(run["grads"], run["lrs"], strict=True), start=1):
        g = grads[i]
        k = math.ceil(t / s)
        p = p * (1 - lr * wd)
        a = a + g / s
        M = b1 * m + (1 - b1) * g
        V = b2 * v + (1 - b2) * g * g
        p = p - lr / (1 - b1**k) * M / (np.sqrt(V) / np.sqrt(1 - b2**k) + eps)
        if t % s == 0:
            m, v, a = b1 * m + (1 - b1) * a, b2 * v + (1 - b2) * a * a, np.zeros_like(p)
        path.append(p)
    return np.array(path)


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], grads: list[list[Tensor]]) -> None:
    for grads_of_step in grads:
        for p, g in zip(params, grads_of_step, strict=True):
            p.grad = g.clone()
        optimizer.step()


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    shapes = draw(st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=10))  # more than ROWS_PER_CALL
    n_steps = draw(st.integers(1, 11))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return {
        "params": [np.array(rng.normal(size=shape)) for shape in shapes],
        "grads": [[np.array(rng.normal(size=shape)) for shape in shapes] for _ in range(n_steps)],
        "lrs": rng.uniform(0, 0.1, size=n_steps).tolist(),
        "betas": (draw(st.sampled_from([0.0, 0.5, 0.9])), draw(st.sampled_from([0.0, 0.95, 0.98]))),
        "eps": draw(st.sampled_from([1e-8, 1e-3])),
        "wd": draw(st.sampled_from([0.0, 0.1])),
        "s": draw(st.integers(1, 5)),
    }


# float32: a step of size lr <= 0.1 has a relative error of some 1e-7, 11 of them stay below 3e-6.
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-12, 1e-13), (torch.float32, 3e-6, 3e-6)])
@given(run=runs())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equals_the_formula_in_every_element(
    compile: bool, dtype: torch.dtype, rtol: float, atol: float, run: dict[str, Any]
) -> None:
    params = [nn.Parameter(torch.tensor(p, dtype=dtype)) for p in run["params"]]
    optimizer = AccumAdamW(
        params, betas=run["betas"], eps=run["eps"], weight_decay=run["wd"], accum_steps=run["s"], compile=compile
    )
    for lr, grads in zip(run["lrs"], run["grads"], strict=True):
        optimizer.param_groups[0]["lr"] = lr
        train(optimizer, params, [[torch.tensor(g, dtype=dtype) for g in grads]])
    for i, p in enumerate(params):
        path = reference(run, i)
        largest = max(1, np.abs(path).max())  # by a tiny gradient with beta2 = 0; a later step may come back from there
        np.testing.assert_allclose(p.detach().numpy(), path[-1], rtol=rtol, atol=atol * largest)
        np.testing.assert_array_equal(p.grad, torch.tensor(run["grads"][-1][i], dtype=dtype))  # it is only read


def normal_run(
    n_steps: int, dtype: torch.dtype = torch.float64, shapes: tuple[tuple[int, ...], ...] = ((3, 2), (5,), ())
) -> tuple[list[nn.Parameter], list[list[Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator)) for shape in shapes]
    grads = [[torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes] for _ in range(n_steps)]
    return params, grads


def test_a_window_of_one_step_is_adamw(compile: bool) -> None:
    ours, grads = normal_run(20)
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    train(AccumAdamW(ours, lr=0.01, weight_decay=0.1, accum_steps=1, compile=compile), ours, grads)
    train(torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.98), weight_decay=0.1), theirs, grads)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # the same formula in another order


def test_three_steps_by_hand(compile: bool) -> None:
    # s = 2, b1 = b2 = 1/2, lr = 1, wd = 0, eps = 0, p = 0, g = 2, 4, 3
    # t=1 k=1  a = 1  M = 1             V = 2              p -= 2 * 1 / sqrt(4)        -> -1
    # t=2 k=1  a = 3  M = 2             V = 8              p -= 2 * 2 / sqrt(16)       -> -2
    #          then m = 3/2, v = 9/2, a = 0
    # t=3 k=2  M = 3/4 + 3/2 = 9/4      V = 9/4 + 9/2 = 27/4, over 3/4: 9  p -= 4/3 * 9/4 / 3  -> -3
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = AccumAdamW([p], lr=1.0, betas=(0.5, 0.5), eps=0.0, weight_decay=0.0, accum_steps=2, compile=compile)
    seen = []
    for g in (2.0, 4.0, 3.0):
        train(optimizer, [p], [[torch.full((2,), g, dtype=torch.float64)]])
        seen.append(p[1].item())
    assert seen == pytest.approx([-1, -2, -3], rel=1e-14)


def test_a_checkpoint_has_this_format(compile: bool) -> None:
    p = nn.Parameter(torch.full((2,), -2.0))  # as after the second of the three steps by hand
    moments = {"exp_avg": torch.full((2,), 1.5), "exp_avg_sq": torch.full((2,), 4.5), "accum_grad": torch.zeros(2)}
    group = {"lr": 1.0, "betas": (0.5, 0.5), "eps": 0.0, "weight_decay": 0.0, "accum_steps": 2, "params": [0]}
    optimizer = AccumAdamW([p], compile=compile)
    optimizer.load_state_dict({"state": {0: {"step": 2, **moments}}, "param_groups": [group]})
    assert optimizer.state_dict()["param_groups"] == [group]
    train(optimizer, [p], [[torch.full((2,), 3.0)]])
    torch.testing.assert_close(p.detach(), torch.full((2,), -3.0))
    assert {k: type(v) for k, v in optimizer.state_dict()["state"][0].items()} == {
        "step": int,
        **dict.fromkeys(moments, Tensor),
    }


def test_a_save_inside_a_window_is_continued_bit_by_bit(compile: bool) -> None:
    params, grads = normal_run(11, torch.float32)
    optimizer = AccumAdamW(params, accum_steps=3, compile=compile)
    train(optimizer, params, grads[:4])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded_params = [nn.Parameter(p.detach().clone()) for p in params]
    loaded = AccumAdamW(loaded_params, lr=1.0, accum_steps=7, compile=compile)  # the saved values replace these
    loaded.load_state_dict(torch.load(file, weights_only=True))
    train(optimizer, params, grads[4:])
    train(loaded, loaded_params, grads[4:])
    assert all(torch.equal(a, b) for a, b in zip(params, loaded_params, strict=True))


def test_a_parameter_that_joins_late_starts_its_own_window(compile: bool) -> None:
    (late, other, _), grads = normal_run(5)
    alone = nn.Parameter(late.detach().clone())
    optimizer = AccumAdamW([late, other], accum_steps=2, compile=compile)
    other.grad = grads[0][1]
    optimizer.step()
    assert torch.equal(late, alone)
    assert late not in optimizer.state
    train(optimizer, [late, other], [grads_of_step[:2] for grads_of_step in grads[1:]])
    train(AccumAdamW([alone], accum_steps=2, compile=compile), [alone], [g[:1] for g in grads[1:]])
    assert torch.equal(late, alone)


def test_every_group_has_its_own_values() -> None:
    (decays, stays, _), _ = normal_run(0)
    start = decays.detach().clone(), stays.detach().clone()
    optimizer = AccumAdamW([{"params": [decays]}, {"params": [stays], "weight_decay": 0.0}], lr=0.5, weight_decay=0.2)
    train(optimizer, [decays, stays], [[torch.zeros_like(decays), torch.zeros_like(stays)]])
    torch.testing.assert_close(decays, start[0] * 0.9, rtol=1e-15, atol=0)
    assert torch.equal(stays, start[1])


def test_compiled_and_eager_moments_have_the_same_bits() -> None:
    compiled, grads = normal_run(8, torch.float32, ((300, 401), (5000,), (7,), ()))
    eager = [nn.Parameter(p.detach().clone()) for p in compiled]
    optimizers = AccumAdamW(compiled, accum_steps=3), AccumAdamW(eager, accum_steps=3, compile=False)
    for optimizer, params in zip(optimizers, (compiled, eager), strict=True):
        train(optimizer, params, grads)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # observed: the last bits differ
        for name in ("exp_avg", "exp_avg_sq", "accum_grad"):
            assert torch.equal(optimizers[0].state[a][name], optimizers[1].state[b][name])


def test_non_contiguous_tensors_get_the_same_update(compile: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    plain, transposed, with_transposed_grad = (
        nn.Parameter(p) for p in (torch.ones(4, 6), torch.ones(6, 4).t(), torch.ones(4, 6))
    )
    optimizer = AccumAdamW([plain, transposed, with_transposed_grad], accum_steps=2, compile=compile)
    for _ in range(5):
        grad = torch.randn(4, 6, generator=generator)
        plain.grad, transposed.grad, with_transposed_grad.grad = grad, grad, grad.t().contiguous().t()
        optimizer.step()
    assert not transposed.is_contiguous()
    for p in (transposed, with_transposed_grad):
        torch.testing.assert_close(p, plain, rtol=1e-6, atol=1e-6)  # observed: the last bits may differ


@pytest.mark.parametrize(("compile", "share"), [(True, 0.001), (False, 0.1)], ids=["compiled", "eager"])
def test_a_step_allocates_a_small_share_of_the_parameters(compile: bool, share: float) -> None:
    params = [nn.Parameter(torch.ones(2500, 1000)), *(nn.Parameter(torch.ones(1000, 1000)) for _ in range(2))]
    params += [nn.Parameter(torch.ones(1000)) for _ in range(500)]  # 5M parameters: a piece is 1.3% of them
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = AccumAdamW(params, accum_steps=2, compile=compile)
    optimizer.step()
    peak_bytes = max(peak_temporary_bytes(optimizer.step) for _ in range(2))  # the end of a window and its beginning
    assert 0 < peak_bytes < share * sum(p.nbytes for p in params)


def test_two_graphs_serve_all_sizes_places_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accum_adamw, "COMPILE_MIN_NUMEL", 1)
    shapes = [(500, 32), (256, 32), (96, 64), (64, 64), (256, 64), (64, 256), (64,), (1,), ()] * 2
    flat = torch.ones(sum(math.prod(shape) for shape in shapes))
    params = [nn.Parameter(torch.ones(3, 5))]
    for shape, place in zip(shapes, flat.split([math.prod(shape) for shape in shapes]), strict=True):
        params.append(nn.Parameter(torch.empty(shape)))
        params[-1].data = place.view(shape)  # as DecentDP has them
    torch._dynamo.reset()
    accum_adamw._compiles.cache_clear()  # as in a new process
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    optimizer = AccumAdamW(params, accum_steps=3)
    for step in range(12):
        optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
        train(optimizer, params, [[torch.ones_like(p) for p in params]])
    assert graphs["unique_graphs"] - before == 2  # inside a window and at its end
    assert torch.equal(flat, params[0][0, 0].expand_as(flat))  # all elements had the same gradients


def test_a_backward_through_changed_parameters_is_an_error(compile: bool) -> None:
    p = nn.Parameter(torch.ones(5000))
    optimizer = AccumAdamW([p], compile=compile)
    loss = p.square().sum()
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_compiled_kernel_uses_all_threads() -> None:
    p = nn.Parameter(torch.ones(5000))
    p.grad = torch.ones(5000)
    optimizer = AccumAdamW([p])
    n_threads = torch.get_num_threads()
    torch._dynamo.reset()
    try:
        torch.set_num_threads(2)
        with (
            torch.compiler.config.patch(  # pyright: ignore[reportAttributeAccessIssue]
                force_disable_caches=True
            ),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
            _, code = run_and_get_cpp_code(optimizer.step)
    finally:
        torch.set_num_threads(n_threads)
    assert "#pragma omp parallel" in code  # that is absent from a kernel that one thread runs


@pytest.mark.parametrize(
    ("environment", "arguments", "expected"),
    [
        ({}, "compile=True", "compiled (cpu, float32)"),
        ({}, "compile=False", "eager, since compile = False (cpu, float32)"),
        ({"CXX": "/nonexistent/c++"}, "", "eager, since torch.compile fails: "),
        ({"TORCH_COMPILE_DISABLE": "1"}, "", "eager, since torch.compile is switched off (cpu, float32)"),
    ],
    ids=["compiler", "compile=False", "no compiler", "switched off"],
)
def test_the_log_says_once_what_is_used(
    tmp_path: Path, environment: dict[str, str], arguments: str, expected: str
) -> None:
    program = (
        "import torch; from optim import AccumAdamW\n"
        "for _ in range(2):\n"
        "  p = torch.nn.Parameter(torch.ones(5000))\n"
        f"  optimizer = AccumAdamW([p], lr=0.5, weight_decay=0.0, {arguments})\n"
        "  for _ in range(9): p.grad = torch.ones(5000); optimizer.step()\n"
        "print(p.min().item(), p.max().item())"
    )
    # A cold cache: or a kernel that an earlier run compiled is found there.
    cold = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)} if environment else {}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **cold, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert done.stderr.count("AccumAdamW: ") == done.stderr.count("AccumAdamW: " + expected) == 1, done.stderr
    # The gradient is always 1, so every step is lr; in the second window M / sqrt(V) is 1 too, bias corrections aside.
    lowest, highest = map(float, done.stdout.split())
    assert lowest == highest == pytest.approx(1 - 9 * 0.5, rel=1e-6)


def test_a_copy_keeps_the_choice() -> None:
    p = nn.Parameter(torch.ones(5000))
    optimizer = copy.deepcopy(AccumAdamW([p], compile=False))
    assert optimizer._compile is False
    assert "compile" not in optimizer.state_dict()["param_groups"][0]  # else a checkpoint would choose


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("lr", lr) for lr in (-1e-3, math.nan)),
        *(("betas", betas) for betas in ((1.0, 0.98), (0.9, -0.1))),
        *(("eps", -1e-8), ("weight_decay", -0.1), ("accum_steps", 0)),
    ],
)
def test_a_value_out_of_range_is_an_error_that_names_it(argument: str, value: Any) -> None:
    p = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=argument):
        AccumAdamW([p], **{argument: value})
    with pytest.raises(ValueError, match=argument):
        AccumAdamW([{"params": [p], argument: value}])


def test_step_returns_the_loss_of_its_closure() -> None:
    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = AccumAdamW([p], lr=0.1, weight_decay=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert p.item() == pytest.approx(2.9)  # the first step is lr * sign(g)


def test_loss_scaler_unscales_and_skips() -> None:
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
