"""Runs that are stopped, killed, or find their files damaged: what is left, and that they resume as if undisturbed."""

import os
import random
import re
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

from tests.checkpoints import assert_equal, rewind, run_in, saved_states, steps_saved
from tests.launcher import Launcher, Run, free_port, timeless, without_times

STILL = ("train.lr_schedule.lr=0", "train.lr_schedule.eta_min=0")  # the parameters stay where they start
SAVING = ("log.run_name=run", "log.checkpoint_interval=5", "log.keep_checkpoints=9")  # after steps 5, 10 and 12


def at_call(n: int, name: str, action: str, *, when: str = "True") -> str:
    """Python to run before train.py: in the n-th call of decent.<name>, do `action` first, on workers with `when`."""
    return f"""
import os, signal, time, decent
decent.liveness.Liveness.TIMEOUT_S = 1
original = decent.{name}
def patched(*args, calls=iter(range(1, 10**9)), **options):
    if next(calls) == {n} and {when}:
        {action}
    return original(*args, **options)
decent.{name} = patched
"""


def is_rank(rank: int) -> str:
    return f'os.environ["RANK"] == "{rank}"'


def assert_mean(found: torch.Tensor, values: list[torch.Tensor], *, rtol: float, atol: float) -> None:
    mean = torch.stack([value.double() for value in values]).mean(0)
    torch.testing.assert_close(found, mean.to(torch.float32), rtol=rtol, atol=atol)


@pytest.fixture(scope="module")
def one(launcher: Launcher) -> Run:
    """An undisturbed run of one worker; copy it before a resume."""
    return launcher.run(*SAVING)


@pytest.fixture(scope="module")
def two(launcher: Launcher) -> Run:
    """An undisturbed run of two workers."""
    return launcher.run(*SAVING, n=2)


@pytest.fixture(scope="module")
def all_reduce(launcher: Launcher) -> Run:
    return launcher.run(*SAVING, "train.backend=pytorchddp", n=2)


# --- The same run ---

# With two workers all topologies are one; three send in a circle, or rest in turn.
CASES: dict[str, tuple[int, int, list[str]]] = {  # workers, nodes
    "complete-adamw": (3, 1, ["train.topology=complete", "train.optim.name=adamw"]),
    "ring-bfloat16": (3, 1, ["train.topology=ring", "train.comm_dtype=bfloat16"]),
    "exp": (3, 1, ["train.topology=exp"]),
    "alternating-gossip_every": (4, 2, ["train.topology=alternating-exp-ring", "train.gossip_every=4"]),
    "pytorchddp": (3, 1, ["train.backend=pytorchddp"]),
}


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_resumed_run_ends_with_the_same_bits(launcher: Launcher, tmp_path: Path, case: str) -> None:
    """Killed after step 14 at the latest, it resumes from step 5: inside a window of accum_steps = 3, between two
    exchanges of gossip_every = 4. What it saves later is equal too, so that it could resume again."""
    n, nodes, changes = CASES[case]
    overrides = (
        *(*changes, "train.global_batch_size=12", "train.n_steps=14", "train.optim.accum_steps=3"),
        *("model.dropout=0.1", "log.eval_interval=4", *SAVING),
    )
    whole = launcher.run(*overrides, n=n, nodes=nodes)
    metrics = timeless(whole)
    parts = rewind(whole, tmp_path, to_step=5)
    (parts / "run/best_model.pth").unlink()
    resumed = run_in(parts, launcher, *overrides, n=n, nodes=nodes)
    assert timeless(resumed) == metrics  # the killed run's evaluations of later steps are told once
    assert sum("Resumed from" in line for line in resumed.log) == 1
    assert steps_saved(parts) == [5, 10, 14]
    for step in (10, 14):
        for a, b in zip(saved_states(resumed, step), saved_states(whole, step), strict=True):
            assert_equal(a, b)
    assert_equal(*(torch.load(run.dir / "best_model.pth", weights_only=True) for run in (resumed, whole)))


@pytest.mark.dist
def test_snapshots_resume_with_the_same_workers_on_other_nodes(launcher: Launcher, tmp_path: Path) -> None:
    """The padding of the flat parameters depends on how many workers a node has."""
    options = ("train.gossip_every=4", *SAVING)
    whole = launcher.run(*options, n=4, nodes=2)
    resumed = run_in(rewind(whole, tmp_path, to_step=5), launcher, *options, n=4, nodes=1)
    assert resumed.codes == [0] * 4, resumed.errors
    for a, b in zip(saved_states(resumed), saved_states(whole), strict=True):
        assert_equal(a["model"], b["model"])
        assert_equal(a["parts"]["optimizer"], b["parts"]["optimizer"])
    # Not bit by bit: over another length, all_reduce adds the workers in another order.
    assert resumed.metrics[-1]["val_loss"] == pytest.approx(whole.metrics[-1]["val_loss"], rel=1e-6)


def test_finished_run_has_nothing_to_do_and_a_longer_one_resumes(launcher: Launcher, one: Run, tmp_path: Path) -> None:
    again = run_in(rewind(one, tmp_path), launcher)
    assert again.codes == [0]
    assert "step-000000012: step 12, and train.n_steps = 12: there is nothing left to do" in again.errors[0]
    assert again.metrics == one.metrics
    longer = run_in(tmp_path, launcher, "train.n_steps=20", "log.checkpoint_interval=5", "log.keep_checkpoints=3")
    assert longer.codes == [0]
    assert [metrics["step"] for metrics in longer.metrics] == [5, 10, 12, 15, 20]
    times = [metrics["total_train_time_s"] for metrics in longer.metrics]
    assert times == sorted(times)
    names = sorted(path.name for path in (longer.dir / "checkpoint").iterdir())
    assert names == ["step-000000012", "step-000000015", "step-000000020"]  # only the newest stay


@pytest.mark.dist
@pytest.mark.fault
def test_all_ranks_resume_from_the_checkpoint_that_rank_0_sees(launcher: Launcher, two: Run, tmp_path: Path) -> None:
    """On a network file system the view of another node may be older."""
    older = """
import os, decent.checkpoint_files as files
list_checkpoints = files.list_checkpoints
if os.environ["RANK"] == "1":
    files.list_checkpoints = lambda path: list_checkpoints(path)[:1]
"""
    resumed = run_in(rewind(two, tmp_path, to_step=10), launcher, n=2, first=older)
    assert timeless(resumed) == timeless(two)
    assert any("step-000000010: step 10" in line for line in resumed.log)


def test_wandb_resumes_the_same_run_in_its_directory(launcher: Launcher, tmp_path: Path) -> None:
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    run_in(tmp_path, launcher, "log.wandb_log=true", "train.n_steps=3", env=env)
    again = run_in(tmp_path, launcher, "log.wandb_log=true", "train.n_steps=4", env=env)
    assert again.codes == [0], again.errors
    ids = [path.name.rsplit("-", 1)[1] for path in (again.dir / "wandb").glob("offline-run-*")]
    assert len(set(ids)) == 1
    assert len(list(again.dir.glob("wandb/offline-run-*/*.wandb"))) == len(ids) > 0


def test_resumed_run_has_the_options_of_its_own_configuration(launcher: Launcher, one: Run, tmp_path: Path) -> None:
    """A gradient scaler that was off starts afresh: as from a GPU with bfloat16 to one without."""
    on = "import torch.amp\nf = torch.amp.GradScaler\ntorch.amp.GradScaler = lambda device, enabled: f(device)"
    options = ("train.n_steps=14", "train.optim.weight_decay=0.3", "train.optim.accum_steps=7")
    run = run_in(rewind(one, tmp_path), launcher, *options, first=on)
    assert run.codes == [0], run.errors
    (state,) = saved_states(run)
    groups = state["parts"]["optimizer"]["param_groups"]
    assert [(group["weight_decay"], group["accum_steps"]) for group in groups] == [(0.3, 7), (0.0, 7)]
    assert state["parts"]["scaler"]["scale"] > 0


# --- Another start: other worlds, optimizers, backends, models ---


@pytest.mark.dist
def test_another_number_of_workers_starts_from_the_mean(launcher: Launcher, two: Run, tmp_path: Path) -> None:
    before = saved_states(two)
    run = run_in(rewind(two, tmp_path), launcher, "train.n_steps=13", *STILL, n=4)
    assert run.codes == [0] * 4, run.errors
    assert any("is of 2 workers, this run has 4: all start from the mean" in line for line in run.log)
    for after in saved_states(run):
        for name, p in after["model"].items():
            assert_mean(p, [state["model"][name] for state in before], rtol=0, atol=1e-7)
    for i, now in saved_states(run)[0]["parts"]["optimizer"]["state"].items():
        assert now["step"] == 13  # ends no window of accum_steps = 2: the moments are those that it started with
        for moment in ("exp_avg", "exp_avg_sq"):
            moments = [state["parts"]["optimizer"]["state"][i][moment] for state in before]
            assert_mean(now[moment], moments, rtol=1e-6, atol=0)


@pytest.mark.dist
def test_all_reduce_resumes_with_any_number_of_workers(launcher: Launcher, all_reduce: Run, tmp_path: Path) -> None:
    resumed = run_in(rewind(all_reduce, tmp_path, to_step=5), launcher, "train.backend=pytorchddp", n=4)
    assert resumed.codes == [0] * 4, resumed.errors
    assert resumed.metrics[-1]["val_loss"] == pytest.approx(all_reduce.metrics[-1]["val_loss"], rel=1e-5)


@pytest.mark.dist
@pytest.mark.parametrize(("then", "now"), [("pytorchddp", "decentdp"), ("decentdp", "pytorchddp")])
def test_another_backend_takes_only_the_weights(
    launcher: Launcher, two: Run, all_reduce: Run, then: str, now: str
) -> None:
    saved = two if then == "decentdp" else all_reduce
    run = launcher.run(f"train.backend={now}", f"checkpoint={saved.dir}", "train.n_steps=5", *STILL, n=2)
    assert run.codes == [0, 0], run.errors
    assert any(f"is of backend {then} with 2 workers: took the mean of their parameters" in line for line in run.log)
    assert run.metrics[0]["step"] == 5
    before = [state["model"] for state in saved_states(saved) if "model" in state]
    for name, p in saved_states(run)[0]["model"].items():
        assert_mean(p, [model[name] for model in before], rtol=0, atol=1e-7)


def test_another_optimizer_starts_afresh_at_the_same_step(launcher: Launcher, one: Run) -> None:
    run = launcher.run(f"checkpoint={one.dir}", "train.n_steps=14", "train.optim.name=adamw", *STILL)
    assert run.codes == [0], run.errors
    assert any("is of accumadamw: adamw starts anew" in line for line in run.log)
    (state,) = saved_states(run)
    assert all(s["step"].item() == 2 for s in state["parts"]["optimizer"]["state"].values())
    assert (run.dir / "best_model.pth").exists()  # a best model of its own, though no loss is below the other run's


@pytest.mark.parametrize(
    ("override", "damaged", "reason"),
    [
        ("train.backend=pytorchddp", False, "is of backend decentdp, this run has pytorchddp: choose another"),
        ("model.n_embd=32", True, "is of a model with n_embd = 16, this one has n_embd = 32"),
        ("train.context_length=8", False, "is of a model with context_length = 16, this one has context_length = 8"),
    ],
)
def test_checkpoint_that_does_not_fit_leaves_its_run_untouched(
    launcher: Launcher, one: Run, tmp_path: Path, override: str, damaged: bool, reason: str
) -> None:
    place = rewind(one, tmp_path)
    if damaged:  # the newest; an older one is read in its place
        (place / "run/checkpoint/step-000000012/index.json").unlink()
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    run = run_in(place, launcher, override)
    assert run.codes == [2]
    assert reason in run.errors[0]
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


@pytest.mark.dist
def test_missing_checkpoint_is_refused(launcher: Launcher) -> None:
    run = launcher.run("checkpoint=/nowhere", n=2)
    assert run.codes == [2, 2]
    assert 'checkpoint = "/nowhere": there is no checkpoint' in run.errors[0]
    assert not run.log_dir.exists()


# --- Files that cannot be written, kept or read ---


def test_unremovable_old_checkpoint_does_not_prevent_a_save(launcher: Launcher, one: Run, tmp_path: Path) -> None:
    refuse = (
        "import decent\ndef refuse(path):\n    raise OSError('not permitted')\ndecent.checkpoint_files.remove = refuse"
    )
    run = run_in(rewind(one, tmp_path), launcher, "log.keep_checkpoints=1", "train.n_steps=13", first=refuse)
    assert run.codes == [0], run.errors
    assert any("step-000000005 cannot be removed: not permitted" in line for line in run.log)
    assert steps_saved(tmp_path) == [5, 10, 12, 13]


def test_damaged_later_checkpoint_does_not_push_out_new_ones(launcher: Launcher, one: Run, tmp_path: Path) -> None:
    place = rewind(one, tmp_path)
    (place / "run/checkpoint/step-000000012/worker-00000.pt").write_bytes(b"")
    run = run_in(place, launcher, "log.keep_checkpoints=1", "train.n_steps=11")
    assert run.codes == [0], run.errors
    assert steps_saved(place) == [11, 12]


@pytest.mark.dist
@pytest.mark.fault
@pytest.mark.parametrize("file", ["worker-00001.pt", "index.json"])
def test_damaged_checkpoint_is_skipped(launcher: Launcher, two: Run, tmp_path: Path, file: str) -> None:
    damaged = rewind(two, tmp_path) / "run/checkpoint/step-000000012" / file  # which damages: test_checkpoint_files.py
    damaged.write_bytes(damaged.read_bytes()[:-100])
    resumed = run_in(tmp_path, launcher, n=2)
    assert timeless(resumed) == timeless(two)
    (warning,) = [line for line in resumed.log if "WARN" in line]
    assert f"step-000000012/{file}: " in warning
    assert "this checkpoint is not used" in warning
    assert any("step-000000010: step 10" in line for line in resumed.log)


@pytest.mark.fault
def test_run_with_only_damaged_checkpoints_is_refused(launcher: Launcher, one: Run, tmp_path: Path) -> None:
    for path in rewind(one, tmp_path).glob("run/checkpoint/*/worker-00000.pt"):
        path.write_bytes(b"")
    again = run_in(tmp_path, launcher)
    assert again.codes == [2]
    assert "none of 3 checkpoints is undamaged" in again.errors[0]


@pytest.mark.dist
@pytest.mark.fault
def test_log_dir_that_nodes_do_not_share_fails_the_first_save(launcher: Launcher, tmp_path: Path) -> None:
    elsewhere = f"""
import os, pathlib, decent.checkpoint_files as files
write = files.write_worker
if os.environ["RANK"] == "1":
    files.write_worker = lambda folder, rank, state: write(pathlib.Path("{tmp_path}/other") / folder.name, rank, state)
"""
    run = run_in(tmp_path / "log", launcher, n=2, first=elsewhere)
    assert run.codes[0] == 1  # what it ended with is not saved
    assert any("not saved, training goes on: " in line and "that all nodes share" in line for line in run.log), run.log
    assert steps_saved(tmp_path / "log") == []


@pytest.mark.fault
def test_full_disk_leaves_the_last_checkpoint_and_the_run(launcher: Launcher, one: Run, tmp_path: Path) -> None:
    checkpoint_bytes = sum(path.stat().st_size for path in (one.dir / "checkpoint/step-000000012").iterdir())
    size_bytes = int(1.6 * checkpoint_bytes + 3 * (one.dir / "best_model.pth").stat().st_size)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        run = run_in(tmp_path, launcher, *SAVING)
        assert run.codes == [1], run.errors  # trained to the end, but the last state is not saved
        assert any("checkpoint of step 10 not saved, training goes on: rank 0: " in line for line in run.log)
        assert [path.name for path in (run.dir / "checkpoint").iterdir()] == ["step-000000005"]
        assert without_times(run) == without_times(one)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.fault
def test_infinite_loss_ends_with_one_line_and_finite_checkpoints(launcher: Launcher, tmp_path: Path) -> None:
    explode = ("train.lr_schedule.lr=1e30", "train.lr_schedule.warmup_steps=10", "train.lr_schedule.eta_min=0")
    options = ("log.checkpoint_interval=1", "train.grad_norm_clip=0", "train.n_steps=30")
    run = run_in(tmp_path, launcher, *explode, *options)
    assert run.codes == [1]
    (line,) = [line for line in run.errors[0].splitlines() if "ERROR" in line]
    assert re.search(r"the loss is (nan|inf) at step \d+: training stops.*train\.lr_schedule\.lr", line)
    assert "Traceback" not in run.errors[0]
    for state in saved_states(run):
        assert all(torch.isfinite(p).all() for p in state["model"].values())


# --- Signals, kills and hangs ---


@pytest.mark.fault
@pytest.mark.dist
@pytest.mark.parametrize(("number", "rank"), [(signal.SIGUSR1, 0), (signal.SIGTERM, 1)])
def test_signal_to_one_worker_stops_all_after_the_same_step(
    launcher: Launcher, tmp_path: Path, number: signal.Signals, rank: int
) -> None:
    endless = ("train.n_steps=100000", "log.eval_interval=100000", "log.checkpoint_interval=5")
    first = at_call(1, "Checkpoints.save", f"os.kill(os.getpid(), {number})", when=is_rank(rank))
    run = run_in(tmp_path, launcher, *endless, n=2, first=first)
    assert run.codes == [0, 0], run.errors
    stopped = re.search(r"Asked to stop: ends after step (\d+); the same command goes on from there", run.errors[0])
    assert stopped, run.errors[0]
    assert 5 < int(stopped[1]) <= 10
    assert steps_saved(tmp_path)[-1] == int(stopped[1])
    again = run_in(tmp_path, launcher, *endless, f"train.n_steps={int(stopped[1]) + 3}", n=2)
    assert again.codes == [0, 0], again.errors
    assert f"step {stopped[1]}\n" in again.errors[0]


@pytest.mark.fault
@pytest.mark.dist
@pytest.mark.parametrize(
    ("n", "name"),
    [
        (2, "checkpoint_files.write_worker"),
        (3, "checkpoint_files.write_worker"),
        (2, "DecentDP.averaged"),
        (2, "DecentDP.mix"),
        (1, "Checkpoints.restore"),
    ],
)
def test_death_of_one_worker_ends_all_and_the_run_resumes(
    launcher: Launcher, two: Run, tmp_path: Path, n: int, name: str
) -> None:
    """In a save, also the last one, in an evaluation, in a step; while the run starts."""
    kill = at_call(n, name, "os._exit(137)", when=is_rank(1))
    killed = run_in(tmp_path, launcher, *SAVING, n=2, first=kill)
    assert killed.codes == [1, 137], killed.errors[0]
    last_line = killed.errors[0].strip().splitlines()[-1]
    assert re.search(r"(step \d+|at the start): .*[Rr]anks? 1\b", last_line), killed.errors[0]
    resumed = run_in(tmp_path, launcher, *SAVING, n=2)
    assert timeless(resumed) == timeless(two)
    for a, b in zip(saved_states(resumed), saved_states(two), strict=True):
        assert_equal(a, b)


@pytest.mark.fault
@pytest.mark.dist
@pytest.mark.parametrize(("wrapper", "hanging"), [("DecentDP", 3), ("AllReduceDP", 0)])
def test_hanging_worker_is_named_by_all_others(launcher: Launcher, tmp_path: Path, wrapper: str, hanging: int) -> None:
    """By its neighbour, and by those that wait for another one which waits for it."""
    wait = f"\n        while len(os.listdir('{tmp_path}')) < 3: time.sleep(0.05)\n        os._exit(0)"
    first = f"""
import atexit, os
if os.environ["RANK"] != "{hanging}":
    atexit.register(lambda: open("{tmp_path}/" + os.environ["RANK"], "w"))
""" + at_call(6, f"{wrapper}.mix", wait, when=is_rank(hanging))
    backend = "decentdp" if wrapper == "DecentDP" else "pytorchddp"
    run = launcher.run(f"train.backend={backend}", "train.timeout_s=3", n=4, first=first)
    for rank in {0, 1, 2, 3} - {hanging}:
        last_line = run.errors[rank].strip().splitlines()[-1]
        assert run.codes[rank] == 1, run.errors
        assert re.search(rf"step \d+: .*(no answer from|timed out waiting for) rank {hanging}\b", last_line), run.errors


# --- Under torchrun ---


def torchrun(
    launcher: Launcher, place: Path, *overrides: str, n: int, options: tuple[str, ...], first: str = "", **env: str
) -> "subprocess.Popen[str]":
    """Start n workers of place/log in the background, each of which runs `first` before train.py."""
    train, *arguments = launcher.arguments(None, (f"log_dir={place}/log", *overrides))
    script = place / "worker.py"
    script.write_text(
        f"import runpy, sys\nsys.path.insert(0, {os.path.dirname(train)!r})\n{first}\n"
        f"runpy.run_path({train!r}, run_name='__main__')\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", *options]
    env = launcher.environment(place, env)
    with open(place / "err", "a") as err:
        return subprocess.Popen([*torchrun, str(script), *arguments], cwd=place, env=env, stderr=err, text=True)


def exit_codes(*processes: "subprocess.Popen[str]") -> list[int]:
    try:
        return [process.wait(270) for process in processes]
    finally:
        for process in processes:
            process.terminate()  # torchrun ends its workers too
            process.wait()


def kill_rank_0_once(place: Path) -> str:
    """Python that kills rank 0 when it saves a second time, once in all starts of this run."""
    action = f"args[0].wait(); open('{place}/killed', 'w'); os.kill(os.getpid(), signal.SIGKILL)"
    return at_call(2, "Checkpoints.save", action, when=f"{is_rank(0)} and not os.path.exists('{place}/killed')")


@pytest.mark.fault
@pytest.mark.dist
@pytest.mark.timeout(300)
def test_torchrun_restarts_from_the_newest_checkpoint(launcher: Launcher, two: Run, tmp_path: Path) -> None:
    """It finds its directory, which is named by the time, and ends with the bits of a run without torchrun."""
    options = ("--standalone", "--max-restarts=1")
    process = torchrun(launcher, tmp_path, n=2, options=options, first=kill_rank_0_once(tmp_path))
    run = Run(exit_codes(process), [(tmp_path / "err").read_text()], tmp_path / "log")
    assert timeless(run) == timeless(two)
    assert any("Restart number 1 of this run" in line for line in run.log)
    assert any("step-000000005: step 5" in line for line in run.log)


@pytest.mark.fault
@pytest.mark.dist
@pytest.mark.timeout(300)
def test_torchruns_of_two_nodes_restart_together(launcher: Launcher, tmp_path: Path) -> None:
    """Rank 0 dies, and the store with it. A busy machine may make a torchrun start its worker more than once."""
    endpoint = f"--rdzv_endpoint=localhost:{free_port()}"
    nodes = ("--nnodes=2", "--rdzv_backend=c10d", endpoint, "--rdzv_id=test", "--local-addr=localhost")
    options, first = (*nodes, "--max-restarts=9"), kill_rank_0_once(tmp_path)
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    processes = [torchrun(launcher, tmp_path, n=1, options=options, first=first, **env) for _ in range(2)]
    run = Run(exit_codes(*processes), [(tmp_path / "err").read_text()], tmp_path / "log")
    assert run.codes == [0, 0], run.errors
    assert any("step-000000005: step 5" in line for line in run.log)
    assert steps_saved(run.log_dir)[-1] == 12


@pytest.mark.dist
def test_restarts_that_could_only_hang_are_refused(launcher: Launcher) -> None:
    run = launcher.run(n=2, nodes=2, env={"TORCHELASTIC_MAX_RESTARTS": "1"})
    assert run.codes == [2, 2]
    assert "--max-restarts=1 on more than one node needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in run.errors[0]
    assert not run.log_dir.exists()


def wait_for(condition: Callable[[], Any], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def workers_of(place: Path) -> list[int]:
    """Process ids of the workers of the run in `place`, without torchrun itself."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
            if f"log_dir={place}/log" in command and "torch.distributed.run" not in command:
                pids.append(int(folder.name))
    return sorted(pids)


@pytest.mark.fault
@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_run_killed_at_20_random_instants_ends_with_the_same_bits(launcher: Launcher, tmp_path: Path) -> None:
    """kill -9 of all workers wherever they are: in a start, a step, a save, an evaluation."""
    overrides = ("train.n_steps=4000", "log.eval_interval=40", "log.checkpoint_interval=15", "log.run_name=run")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()

    def start(place: Path) -> "subprocess.Popen[str]":
        return torchrun(launcher, place, *overrides, n=2, options=("--standalone",))

    assert exit_codes(start(whole)) == [0]
    seed = time.time_ns()
    print(f"seed {seed}")
    rng = random.Random(seed)
    killed_at: list[int] = []  # newest checkpoint at each kill
    for n in range(20):
        before = steps_saved(parts / "log")[-1:]
        process = start(parts)
        if n % 4 == 0:  # anywhere, most often while it starts
            wait_for(lambda: len(workers_of(parts)) == 2)
            time.sleep(rng.uniform(0, 5))
        else:  # while it trains, having come further than the start before it
            wait_for(lambda before=before: steps_saved(parts / "log")[-1:] > before)
            time.sleep(rng.uniform(0, 0.3))
        assert process.poll() is None, f"ended before kill {n + 1}: give it more steps"
        for pid in workers_of(parts):
            os.kill(pid, signal.SIGKILL)
        assert process.wait(60) != 0
        killed_at += steps_saved(parts / "log")[-1:] or [0]
    print(f"newest checkpoints after each kill: {killed_at}")
    assert exit_codes(start(parts)) == [0]
    a, b = (Run([], [], place / "log") for place in (parts, whole))
    assert timeless(a) == timeless(b)
    for x, y in zip(saved_states(a), saved_states(b), strict=True):
        assert_equal(x, y)
