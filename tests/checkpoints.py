"""Runs in one directory, and what their checkpoints hold."""

import shutil
from pathlib import Path
from typing import Any

import torch

from tests.launcher import Launcher, Run

CLOCKS = {"train_time_s", "evaluated_time_s", "data_wait_s"}


def run_in(place: Path, launcher: Launcher, *overrides: str, **options: Any) -> Run:
    """Run in place/run, and resume what is there."""
    run = launcher.run(f"log_dir={place}", "log.run_name=run", *overrides, **options)
    return Run(run.codes, run.errors, place)


def rewind(run: Run, place: Path, *, to_step: int | None = None) -> Path:
    """Copy a run to place/run, as a kill some time after `to_step` would have left it, and return `place`."""
    shutil.copytree(run.dir, place / "run")
    for path in (place / "run/checkpoint").iterdir():
        if to_step is not None and int(path.name[5:]) > to_step:
            shutil.rmtree(path)
    return place


def steps_saved(place: Path) -> list[int]:
    """Steps of the checkpoints of the runs in a log_dir, sorted."""
    return sorted(int(path.name[5:]) for path in place.glob("*/checkpoint/step-*"))


def saved_states(run: Run, step: int | None = None) -> list[dict[str, Any]]:
    """Every worker's state after `step`; None means the last one saved."""
    step = steps_saved(run.log_dir)[-1] if step is None else step
    paths = sorted((run.dir / f"checkpoint/step-{step:09d}").glob("worker-*.pt"))
    assert paths
    return [torch.load(path, weights_only=True) for path in paths]


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Compare nested states bit by bit, except for the clocks."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - CLOCKS:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}.{i}")
    else:
        assert a == b, where
