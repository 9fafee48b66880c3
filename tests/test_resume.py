"""Runs that are stopped, killed, or find their files damaged: what is left, and that they go on as if undisturbed."""

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from decent.checkpoint_files import read_index, write_index
from tests.launcher import Launcher, Run, free_port, timeless, without_times

N_STEPS = 14
LONG = ("train.n_steps=100000", "log.eval_interval=100000", "log.checkpoint_interval=50", "log.run_name=run")
UNNAMED = ("train.n_steps=700", "log.eval_interval=100000", "log.checkpoint_interval=50")


def final_states(run: Run) -> list[dict[str, Any]]:
    """What each worker saved last."""
    newest = sorted((run.dir / "checkpoint").glob("step-*"))[-1]
    return [torch.load(path, weights_only=True) for path in sorted(newest.glob("worker-*.pt"))]


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Bit by bit, except for the clocks."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"train_time_s", "evaluated_time_s", "data_wait_s"}:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}.{i}")
    else:
        assert a == b, where


def in_place(launcher: Launcher, place: Path, *overrides: str, **options: Any) -> Run:
    """A run whose log_dir is that of others."""
    run = launcher.run(f"log_dir={place}", "log.run_name=run", *overrides, **options)
    return Run(run.codes, run.errors, place)


# Stops every worker at the end of a given step, as a kill between two steps would, when the last save is written.
KILL_AFTER = """
if True:
    import decent.checkpoint, decent.stop
    agreed = decent.stop.StopRequest.agreed
    save = decent.checkpoint.Checkpoints.save
    savers = []
    def noting(self, step):
        savers.append(self)
        save(self, step)
    decent.checkpoint.Checkpoints.save = noting
    def dying(self, step, steps=iter(range(1, 10**9)), **options):
        if next(steps) == {n}:
            all(saver.wait() for saver in savers[-1:])
            os._exit(137)
        return agreed(self, step, **options)
    decent.stop.StopRequest.agreed = dying
"""
QUICK_ROLL_CALL = """
    import decent.liveness
    decent.liveness.Liveness.TIMEOUT_S = 1
"""

# Workers and nodes: with two workers all topologies are one, and three take turns to send one way or to rest.
CASES: dict[str, tuple[int, int, list[str]]] = {
    "complete": (3, 1, ["train.topology=complete"]),
    "ring": (3, 1, ["train.topology=ring"]),
    "exp": (4, 1, ["train.topology=exp"]),
    "alternating-exp-ring": (4, 2, ["train.topology=alternating-exp-ring"]),
    "bf16": (2, 1, ["train.topology=exp", "train.comm_dtype=bfloat16"]),
    "gossip_every": (2, 1, ["train.topology=exp", "train.gossip_every=4"]),
    "adamw": (2, 1, ["train.topology=exp", "train.optim.name=adamw"]),
    "pytorchddp": (3, 1, ["train.backend=pytorchddp"]),
}


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_twice_ends_with_the_same_bits(launcher: Launcher, tmp_path: Path, case: str) -> None:
    """Checkpoints at steps 4, 8, 12: in a window of accum_steps = 3, between two exchanges of gossip_every = 4 ..."""
    n, nodes, changes = CASES[case]
    options: dict[str, Any] = {"n": n, "nodes": nodes}
    overrides = (
        *changes,
        "train.global_batch_size=12",
        f"train.n_steps={N_STEPS}",
        "train.optim.accum_steps=3",
        "model.dropout=0.1",
        "log.eval_interval=5",
        "log.checkpoint_interval=3" if case == "gossip_every" else "log.checkpoint_interval=4",
    )
    undisturbed = in_place(launcher, tmp_path / "whole", *overrides, **options)
    assert undisturbed.codes == [0] * n, undisturbed.errors
    for n_steps_until_the_kill in (6, 5):
        killed = in_place(
            launcher, tmp_path / "parts", *overrides, first=KILL_AFTER.format(n=n_steps_until_the_kill), **options
        )
        assert killed.codes == [137] * n, killed.errors
    resumed = in_place(launcher, tmp_path / "parts", *overrides, **options)
    assert resumed.codes == [0] * n, resumed.errors
    assert sum("Resumed from" in line for line in resumed.log) == 2
    assert timeless(resumed) == timeless(undisturbed)
    for a, b in zip(final_states(resumed), final_states(undisturbed), strict=True):
        assert_equal(a, b)
    best = [torch.load(run.dir / "best_model.pth", weights_only=True) for run in (resumed, undisturbed)]
    assert_equal(*best)


def test_a_finished_run_has_nothing_to_do_and_a_longer_one_goes_on(launcher: Launcher, tmp_path: Path) -> None:
    first = in_place(launcher, tmp_path)
    again = in_place(launcher, tmp_path)
    assert again.codes == [0]
    assert "step-000000012: step 12, and train.n_steps = 12: there is nothing left to do" in again.errors[0]
    assert again.metrics == first.metrics
    longer = in_place(launcher, tmp_path, "train.n_steps=20")
    assert longer.codes == [0]
    assert [metrics["step"] for metrics in longer.metrics] == [5, 10, 12, 15, 20]
    times = [metrics["total_train_time_s"] for metrics in longer.metrics]
    assert times == sorted(times)


def test_what_a_killed_run_told_of_later_steps_is_told_once(launcher: Launcher, tmp_path: Path) -> None:
    options = ("log.checkpoint_interval=4", "log.eval_interval=3")
    in_place(launcher, tmp_path, *options, first=KILL_AFTER.format(n=8))  # told of steps 3 and 6, saved step 4
    resumed = in_place(launcher, tmp_path, *options)
    assert [metrics["step"] for metrics in resumed.metrics] == [3, 6, 9, 12]


def test_only_the_newest_checkpoints_stay(launcher: Launcher, tmp_path: Path) -> None:
    run = in_place(launcher, tmp_path, "log.checkpoint_interval=2", "log.keep_checkpoints=3")
    names = sorted(path.name for path in (run.dir / "checkpoint").iterdir())
    assert names == ["step-000000008", "step-000000010", "step-000000012"]


def test_a_checkpoint_is_saved_though_an_older_one_cannot_be_removed(launcher: Launcher, tmp_path: Path) -> None:
    refuse = """
import decent.checkpoint
def refuse(path):
    raise OSError("not permitted")
decent.checkpoint.remove = refuse
"""
    run = in_place(launcher, tmp_path, "log.keep_checkpoints=1", first=refuse)
    assert run.codes == [0], run.errors
    assert any("step-000000005 cannot be removed: not permitted" in line for line in run.log)
    assert (run.dir / "checkpoint/step-000000012").exists()


def test_a_damaged_checkpoint_of_a_later_step_does_not_push_out_what_is_saved_now(
    launcher: Launcher, tmp_path: Path
) -> None:
    options = ("log.checkpoint_interval=5", "log.keep_checkpoints=1")
    run = in_place(launcher, tmp_path, options[0])
    spoil("truncated", run.dir / "checkpoint/step-000000012/worker-00000.pt")
    run = in_place(launcher, tmp_path, *options, "train.n_steps=11")
    assert run.codes == [0], run.errors
    names = sorted(path.name for path in (run.dir / "checkpoint").iterdir())
    assert names == ["step-000000011", "step-000000012"]


@pytest.mark.dist
@pytest.mark.fault
def test_all_workers_go_on_from_the_checkpoint_that_rank_0_sees(launcher: Launcher, tmp_path: Path) -> None:
    """On a network file system the view of another node may be older."""
    options = ("log.checkpoint_interval=5",)
    whole = in_place(launcher, tmp_path / "whole", *options, n=2)
    in_place(launcher, tmp_path / "parts", *options, n=2, first=KILL_AFTER.format(n=11))
    older = (
        "import decent.checkpoint as c\nf = c.complete\nif os.environ['RANK'] == '1': c.complete = lambda p: f(p)[:1]"
    )
    resumed = in_place(launcher, tmp_path / "parts", *options, n=2, first=older)
    assert resumed.codes == [0, 0], resumed.errors
    assert timeless(resumed) == timeless(whole)


@pytest.mark.dist
@pytest.mark.fault
def test_a_log_dir_that_the_nodes_do_not_share_is_an_error_of_the_first_save(
    launcher: Launcher, tmp_path: Path
) -> None:
    elsewhere = f"""
import pathlib, decent.checkpoint as c
write = c.write_worker
if os.environ["RANK"] == "1":
    c.write_worker = lambda folder, rank, state: write(pathlib.Path("{tmp_path}/other") / folder.name, rank, state)
"""
    run = in_place(launcher, tmp_path / "log", n=2, first=elsewhere)
    assert run.codes[0] == 1  # what it ended with is not saved
    assert any("not saved, training goes on: " in line and "that all nodes share" in line for line in run.log), run.log
    assert steps_saved(tmp_path) == []


# --- Another start: other worlds, other backends, wandb ---


@pytest.mark.dist
def test_snapshots_go_on_with_the_same_workers_on_other_nodes(launcher: Launcher, tmp_path: Path) -> None:
    """The padding of the flat parameters depends on how many workers a node has."""
    options = ("train.gossip_every=4", "log.checkpoint_interval=6")
    whole = in_place(launcher, tmp_path / "whole", *options, n=4, nodes=2)
    in_place(launcher, tmp_path / "parts", *options, n=4, nodes=2, first=KILL_AFTER.format(n=8))
    resumed = in_place(launcher, tmp_path / "parts", *options, n=4, nodes=1)
    assert resumed.codes == [0] * 4, resumed.errors
    assert resumed.losses == whole.losses


def test_a_gradient_scaler_that_was_off_when_the_state_was_saved_starts_anew(
    launcher: Launcher, tmp_path: Path
) -> None:
    """As from a GPU with bfloat16 to one without."""
    in_place(launcher, tmp_path)
    on = "import torch.amp\nf = torch.amp.GradScaler\ntorch.amp.GradScaler = lambda device, enabled: f(device)"
    run = in_place(launcher, tmp_path, "train.n_steps=14", first=on)
    assert run.codes == [0], run.errors
    assert final_states(run)[0]["parts"]["scaler"]["scale"] > 0


def test_a_run_that_starts_from_anothers_checkpoint_has_its_own_best_model(launcher: Launcher, tmp_path: Path) -> None:
    first = in_place(launcher, tmp_path)
    still = ("train.lr_schedule.lr=0", "train.lr_schedule.eta_min=0")  # never better than the first
    run = launcher.run(f"checkpoint={first.dir}", "train.n_steps=13", *still)
    assert run.codes == [0], run.errors
    assert (run.dir / "best_model.pth").exists()


@pytest.mark.parametrize("newest", ["whole", "truncated"])
def test_another_backend_in_the_same_directory_is_refused(launcher: Launcher, tmp_path: Path, newest: str) -> None:
    before = in_place(launcher, tmp_path)
    metrics = before.metrics
    if newest != "whole":
        spoil(newest, before.dir / "checkpoint/step-000000012/index.json")
    run = in_place(launcher, tmp_path, "train.backend=pytorchddp")
    assert run.codes == [2]
    assert "is of backend decentdp, this run has pytorchddp: choose another log.run_name" in run.errors[0]
    assert run.metrics == metrics


@pytest.mark.dist
def test_other_numbers_of_workers_start_from_the_mean(launcher: Launcher, tmp_path: Path) -> None:
    before = final_states(in_place(launcher, tmp_path, n=4))
    run = in_place(launcher, tmp_path, "train.n_steps=13", "train.lr_schedule.lr=0", "train.lr_schedule.eta_min=0", n=2)
    assert run.codes == [0, 0], run.errors
    assert any("is of 4 workers, this run has 2: all start from the mean" in line for line in run.log)
    for after in final_states(run):  # with lr = 0 the parameters stay where they started
        for name, p in after["model"].items():
            mean = torch.stack([state["model"][name].double() for state in before]).mean(0)
            torch.testing.assert_close(p, mean.to(torch.float32), rtol=0, atol=1e-7)
    for i, now in final_states(run)[0]["parts"]["optimizer"]["state"].items():
        assert now["step"] == 13  # ends no window of accum_steps = 2: the moments are still those that it started with
        for moment in ("exp_avg", "exp_avg_sq"):
            mean = torch.stack([s["parts"]["optimizer"]["state"][i][moment].double() for s in before]).mean(0)
            torch.testing.assert_close(now[moment], mean.to(torch.float32), rtol=1e-6, atol=0)


@pytest.mark.dist
def test_all_reduce_resumes_with_any_number_of_workers(launcher: Launcher, tmp_path: Path) -> None:
    options = ("train.backend=pytorchddp", "train.n_steps=14", "log.checkpoint_interval=7")
    whole = in_place(launcher, tmp_path / "whole", *options, n=2)
    in_place(launcher, tmp_path / "parts", *options, n=2, first=KILL_AFTER.format(n=9))
    resumed = in_place(launcher, tmp_path / "parts", *options, n=4)
    assert resumed.codes == [0] * 4, resumed.errors
    assert resumed.metrics[-1]["val_loss"] == pytest.approx(whole.metrics[-1]["val_loss"], rel=1e-5)


@pytest.mark.dist
@pytest.mark.parametrize(("then", "now"), [("pytorchddp", "decentdp"), ("decentdp", "pytorchddp")])
def test_another_backend_takes_the_weights_only(launcher: Launcher, tmp_path: Path, then: str, now: str) -> None:
    saved = in_place(launcher, tmp_path, f"train.backend={then}", n=2)
    start = (f"checkpoint={saved.dir}", "train.lr_schedule.lr=0", "train.lr_schedule.eta_min=0")
    run = launcher.run(f"train.backend={now}", *start, n=2)
    assert run.codes == [0, 0], run.errors
    assert any(f"is of backend {then} with 2 workers: took the mean of their parameters" in line for line in run.log)
    assert run.metrics[0]["step"] == 5
    states = final_states(saved)
    n = len([state for state in states if "model" in state])
    for name, p in final_states(run)[0]["model"].items():
        mean = torch.stack([state["model"][name].double() for state in states[:n]]).mean(0)
        torch.testing.assert_close(p, mean.to(torch.float32), rtol=0, atol=1e-7)


def test_wandb_goes_on_with_the_same_run(launcher: Launcher, tmp_path: Path) -> None:
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    first = in_place(launcher, tmp_path, "log.wandb_log=true", env=env)
    (before,) = final_states(first)
    again = in_place(launcher, tmp_path, "log.wandb_log=true", "train.n_steps=14", env=env)
    assert again.codes == [0], again.errors
    (after,) = final_states(again)
    assert before["parts"]["report"]["wandb_id"] == after["parts"]["report"]["wandb_id"] is not None
    names = [path.name for path in (again.dir / "wandb").glob("offline-run-*")]
    assert len({name.rsplit("-", 1)[1] for name in names}) == 1


# --- Damaged and hostile files ---


def spoil(how: str, path: Path) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[:-100])
    elif how == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "missing":
        path.unlink()


@pytest.mark.dist
@pytest.mark.fault
@pytest.mark.parametrize("file", ["worker-00001.pt", "index.json"])
@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_found_and_the_one_before_used(
    launcher: Launcher, tmp_path: Path, how: str, file: str
) -> None:
    whole = in_place(launcher, tmp_path, "log.checkpoint_interval=5", n=2)
    before = timeless(whole)
    spoil(how, whole.dir / "checkpoint" / "step-000000012" / file)
    resumed = in_place(launcher, tmp_path, "log.checkpoint_interval=5", n=2)
    assert resumed.codes == [0, 0], resumed.errors
    (warning,) = [line for line in resumed.log if "WARN" in line]
    assert f"step-000000012/{file}: " in warning
    assert "this checkpoint is not used" in warning
    assert any("step-000000010: step 10" in line for line in resumed.log)
    assert timeless(resumed) == before


@pytest.mark.fault
def test_when_all_checkpoints_are_damaged_the_run_is_refused(launcher: Launcher, tmp_path: Path) -> None:
    run = in_place(launcher, tmp_path)
    for path in (run.dir / "checkpoint").glob("*/worker-00000.pt"):
        spoil("truncated", path)
    again = in_place(launcher, tmp_path)
    assert again.codes == [2]
    assert "none of 2 checkpoints is undamaged" in again.errors[0]


@pytest.mark.fault
def test_no_code_of_a_checkpoint_is_run(launcher: Launcher, tmp_path: Path) -> None:
    run = in_place(launcher, tmp_path)
    for path in (run.dir / "checkpoint").glob("*/worker-00000.pt"):
        torch.save({"model": Evil(tmp_path / "was here")}, path)
        saved, content = read_index(path.parent), path.read_bytes()
        facts = [{"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}]  # as an attacker would
        write_index(path.parent, saved.step, saved.about, facts)
    again = in_place(launcher, tmp_path)
    assert again.codes == [2]
    assert "holds more than tensors and numbers, which could run code: not loaded" in again.errors[0]
    assert not (tmp_path / "was here").exists()


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["checkpoint=/nowhere"], ['checkpoint = "/nowhere"', "there is no checkpoint"]),
        (["log.keep_checkpoints=0"], ["log.keep_checkpoints"]),
        (["log.checkpoint_interval=0"], ["log.checkpoint_interval"]),
    ],
)
def test_a_missing_checkpoint_and_numbers_out_of_bounds_are_refused(
    launcher: Launcher, overrides: list[str], parts: list[str]
) -> None:
    run = launcher.run(*overrides, n=2)
    assert run.codes == [2, 2]
    assert all(part in run.errors[0] for part in parts), run.errors[0]
    assert not run.log_dir.exists()


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("model.n_embd=32", "is of a model with n_embd = 16, this one has n_embd = 32"),
        ("train.context_length=8", "is of a model with context_length = 16, this one has context_length = 8"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_its_run_untouched(
    launcher: Launcher, tmp_path: Path, override: str, part: str
) -> None:
    before = in_place(launcher, tmp_path)
    config = (before.dir / "config.toml").read_text()
    run = in_place(launcher, tmp_path, override)
    assert run.codes == [2]
    assert part in run.errors[0]
    assert (before.dir / "config.toml").read_text() == config


def test_a_resumed_run_has_the_hyperparameters_of_its_own_configuration(launcher: Launcher, tmp_path: Path) -> None:
    in_place(launcher, tmp_path)
    run = in_place(launcher, tmp_path, "train.n_steps=14", "train.optim.weight_decay=0.3", "train.optim.accum_steps=7")
    (state,) = final_states(run)
    groups = state["parts"]["optimizer"]["param_groups"]
    assert [(group["weight_decay"], group["accum_steps"]) for group in groups] == [(0.3, 7), (0.0, 7)]


def test_another_optimizer_starts_anew_at_the_same_step(launcher: Launcher, tmp_path: Path) -> None:
    in_place(launcher, tmp_path)
    run = in_place(launcher, tmp_path, "train.n_steps=14", "train.optim.name=adamw")
    assert run.codes == [0], run.errors
    assert any("is of accumadamw: adamw starts anew" in line for line in run.log)
    (state,) = final_states(run)
    assert all(s["step"].item() == 2 for s in state["parts"]["optimizer"]["state"].values())


# --- Signals and kills ---


def start(
    launcher: Launcher, place: Path, *overrides: str, n: int, options: tuple[str, ...] = ("--standalone",), **env: str
) -> "subprocess.Popen[str]":
    """Under torchrun, in the background, with n workers on this node."""
    command = ["-m", "torch.distributed.run", f"--nproc_per_node={n}", *options]
    with open(place / "err", "a") as err:
        return subprocess.Popen(
            [sys.executable, *command, *launcher.arguments(None, (f"log_dir={place}/log", *overrides))],
            cwd=place,
            env=launcher.environment(place, None) | env,
            stdin=subprocess.DEVNULL,
            stdout=err,
            stderr=err,
            text=True,
        )


def wait_for(condition: Callable[[], Any], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def workers_of(place: Path) -> list[int]:
    """Process ids of the workers of the run in `place`, not of torchrun itself."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
            if f"log_dir={place}/log" in command and "torch.distributed.run" not in command:
                pids.append(int(folder.name))
    return sorted(pids)


def steps_saved(place: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (place / "log").glob("*/checkpoint/step-*"))


@pytest.mark.fault
@pytest.mark.dist
@pytest.mark.parametrize(("number", "rank"), [(signal.SIGUSR1, 0), (signal.SIGTERM, 1)])
def test_a_signal_to_one_worker_stops_all_after_the_same_step(
    launcher: Launcher, tmp_path: Path, number: signal.Signals, rank: int
) -> None:
    process = start(launcher, tmp_path, *LONG, n=2)
    wait_for(lambda: steps_saved(tmp_path))
    (pid,) = [pid for pid in workers_of(tmp_path) if rank_of(pid) == rank]
    os.kill(pid, number)
    assert process.wait(60) == 0, (tmp_path / "err").read_text()
    log = (tmp_path / "log/run/train.log").read_text()
    stopped = re.search(r"Asked to stop: ends after step (\d+); the same command goes on from there", log)
    assert stopped, log
    assert steps_saved(tmp_path)[-1] == int(stopped[1])
    again = start(launcher, tmp_path, *LONG, f"train.n_steps={int(stopped[1]) + 3}", n=2)
    assert again.wait(60) == 0, (tmp_path / "err").read_text()
    assert f"step {stopped[1]}\n" in (tmp_path / "log/run/train.log").read_text()


@pytest.mark.fault
@pytest.mark.dist
def test_torchrun_restarts_from_the_newest_checkpoint_in_the_same_directory(launcher: Launcher, tmp_path: Path) -> None:
    options = ("--standalone", "--max-restarts=1")
    process = start(launcher, tmp_path, *UNNAMED, n=2, options=options)
    wait_for(lambda: len(steps_saved(tmp_path)) == 2)
    os.kill(workers_of(tmp_path)[0], signal.SIGKILL)
    assert process.wait(60) == 0, (tmp_path / "err").read_text()
    (run_dir,) = (tmp_path / "log").iterdir()
    log = (run_dir / "train.log").read_text()
    assert "Restart number 1 of this run" in log
    assert "Resumed from" in log


def two_nodes(launcher: Launcher, place: Path, *overrides: str, **env: str) -> "list[subprocess.Popen[str]]":
    """Two torchruns with a worker each, which may be restarted once."""
    rendezvous = (
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=localhost:{free_port()}",
        "--rdzv_id=test",
        "--local-addr=localhost",
    )
    options = ("--nnodes=2", *rendezvous, "--max-restarts=1")
    return [start(launcher, place, *overrides, n=1, options=options, **env) for _ in range(2)]


def rank_of(pid: int) -> int:
    (rank,) = re.findall(r"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_text())
    return int(rank)


@pytest.mark.fault
@pytest.mark.dist
@pytest.mark.parametrize("rank", [0, 1])
def test_the_torchruns_of_two_nodes_restart_together(launcher: Launcher, tmp_path: Path, rank: int) -> None:
    nodes = two_nodes(launcher, tmp_path, *UNNAMED, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    wait_for(lambda: len(steps_saved(tmp_path)) == 2)
    (pid,) = [pid for pid in workers_of(tmp_path) if rank_of(pid) == rank]
    os.kill(pid, signal.SIGKILL)
    assert [node.wait(90) for node in nodes] == [0, 0], (tmp_path / "err").read_text()
    (run_dir,) = (tmp_path / "log").iterdir()
    assert "Resumed from" in (run_dir / "train.log").read_text()
    assert steps_saved(tmp_path)[-1] == 700


@pytest.mark.dist
def test_restarts_on_two_nodes_that_could_only_hang_are_refused(launcher: Launcher, tmp_path: Path) -> None:
    nodes = two_nodes(launcher, tmp_path, *LONG)
    assert all(node.wait(60) for node in nodes)
    assert (
        "--max-restarts=1 on more than one node needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        in (tmp_path / "err").read_text()
    )
    assert not (tmp_path / "log").exists()


@pytest.mark.fault
@pytest.mark.dist
@pytest.mark.parametrize(("backend", "rank"), [("decentdp", 1), ("decentdp", 3), ("pytorchddp", 0)])
def test_a_hanging_worker_is_named(launcher: Launcher, backend: str, rank: int) -> None:
    """By one that waits for it, and by one that waits for another that waits for it."""
    asleep = (
        KILL_AFTER.removeprefix("\nif True:").format(n=6).replace("os._exit(137)", "time.sleep(6)") + QUICK_ROLL_CALL
    )
    hang = f"import time\nif os.environ['RANK'] == '{rank}':{asleep}\nelse:{QUICK_ROLL_CALL}"
    run = launcher.run(f"train.backend={backend}", "train.timeout_s=3", n=4, first=hang, timeout_s=50)
    last_line = run.errors[rank == 0].strip().splitlines()[-1]
    assert run.codes[rank == 0] == 1, run.errors
    assert re.search(rf"step \d+: .*(no answer from|waited in vain for) rank {rank}\b", last_line), run.errors


@pytest.mark.fault
@pytest.mark.dist
@pytest.mark.parametrize(
    ("owner", "n_before"),
    [
        ("checkpoint.write_worker", 1),
        ("checkpoint.write_worker", 2),
        ("DecentDP.averaged", 1),
        ("DecentDP.mix", 1),
        ("Checkpoints.restore", 0),
    ],
)
def test_one_worker_killed_ends_all_and_the_run_goes_on_from_the_last_checkpoint(
    launcher: Launcher, tmp_path: Path, owner: str, n_before: int
) -> None:
    """In a save, also the last one, in an evaluation, in a step; while the run starts."""
    whole = in_place(launcher, tmp_path / "whole", n=2)
    owner, name = owner.split(".")
    kill = f"""
import decent.checkpoint
original = decent.{owner}.{name}
def dying(*args, calls=[]):
    calls.append(1)
    if len(calls) > {n_before} and os.environ["RANK"] == "1":
        os._exit(137)
    return original(*args)
decent.{owner}.{name} = dying
if True:{QUICK_ROLL_CALL}
"""
    killed = in_place(launcher, tmp_path / "parts", n=2, first=kill)
    assert killed.codes[1] == 137
    assert killed.codes[0] == 1, killed.errors[0]
    assert re.search(r"(step \d+|at the start): .*[Rr]anks? 1\b", killed.errors[0].strip().splitlines()[-1]), (
        killed.errors[0]
    )
    resumed = in_place(launcher, tmp_path / "parts", n=2)
    assert resumed.codes == [0, 0], resumed.errors
    assert timeless(resumed) == timeless(whole)
    for a, b in zip(final_states(resumed), final_states(whole), strict=True):
        assert_equal(a, b)


@pytest.mark.fault
@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_20_random_instants_the_run_ends_with_the_same_bits(launcher: Launcher, tmp_path: Path) -> None:
    """kill -9 of all workers wherever they are: in a start, a step, a save, an evaluation."""
    overrides = ("train.n_steps=4000", "log.eval_interval=40", "log.checkpoint_interval=15", "log.run_name=run")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    assert start(launcher, whole, *overrides, n=2).wait(120) == 0
    seed = time.time_ns()
    print(f"seed {seed}")
    rng = random.Random(seed)
    killed_at: list[int] = []  # the step from which each next start goes on
    for n in range(20):
        before = steps_saved(parts)[-1:]
        process = start(launcher, parts, *overrides, n=2)
        if n % 4 == 0:  # anywhere, most often while it starts
            wait_for(lambda: len(workers_of(parts)) == 2)
            time.sleep(rng.uniform(0, 5))
        else:  # while it trains, having come further than the start before it
            wait_for(lambda before=before: steps_saved(parts)[-1:] > before)
            time.sleep(rng.uniform(0, 0.3))
        assert process.poll() is None, f"ended before kill {n + 1}: give it more steps"
        for pid in workers_of(parts):
            os.kill(pid, signal.SIGKILL)
        assert process.wait(60) != 0
        killed_at += steps_saved(parts)[-1:] or [0]
    print(f"newest checkpoints after each kill: {killed_at}")
    assert start(launcher, parts, *overrides, n=2).wait(120) == 0
    a, b = (Run([], [], place / "log") for place in (parts, whole))
    assert timeless(a) == timeless(b)
    for x, y in zip(final_states(a), final_states(b), strict=True):
        assert_equal(x, y)


@pytest.mark.fault
def test_a_full_disk_leaves_the_last_checkpoint_and_the_run(launcher: Launcher, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    whole = in_place(launcher, tmp_path / "whole", "log.checkpoint_interval=4")
    one = sum(path.stat().st_size for path in (whole.dir / "checkpoint" / "step-000000012").iterdir())
    best = (whole.dir / "best_model.pth").stat().st_size
    size = int(1.6 * one + 3 * best)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        run = in_place(launcher, disk, "log.checkpoint_interval=4")
        assert run.codes == [1], run.errors  # trained to the end, but the last state is not saved
        assert any("checkpoint of step 8 not saved, training goes on: rank 0: " in line for line in run.log)
        assert [path.name for path in (run.dir / "checkpoint").iterdir()] == ["step-000000004"]
        assert without_times(run) == without_times(whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    shutil.rmtree(disk)


@pytest.mark.fault
def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(launcher: Launcher, tmp_path: Path) -> None:
    explode = ("train.lr_schedule.lr=1e30", "train.lr_schedule.warmup_steps=10", "train.lr_schedule.eta_min=0")
    run = in_place(
        launcher, tmp_path, *explode, "log.checkpoint_interval=1", "train.grad_norm_clip=0", "train.n_steps=30"
    )
    assert run.codes == [1]
    assert "training stops" in run.errors[0]
    for state in final_states(run):
        assert all(torch.isfinite(p).all() for p in state["model"].values())
