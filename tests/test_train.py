"""Whole runs of train.py: the run directory, laws that training must keep, and how mistakes end it."""

import math
import re
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from config import ModelConfig, load_config
from data.loader import TokenDataset
from decent.run_log import append_line
from model import GPT
from optim import lr_at
from tests.launcher import (
    BATCH_SIZE,
    CONFIG,
    CONTEXT_LENGTH,
    EVAL_STEPS,
    ROOT,
    Launcher,
    Run,
    finish,
    free_port,
    timeless,
)

STAMP = r"\[\d\d:\d\d:\d\d  INFO\] "
EVALUATION = re.compile(
    STAMP + r"Step (\d+), Val loss: (\d+\.\d{6}), Train loss: (\d+\.\d{6}), "
    r"Train time: (\d+\.\d{3}) s \((\d+\.\d{3}) ms/step\), Total train time: (\d+\.\d{3}) s"
)


# --- A run and what it leaves ---


@pytest.fixture(scope="module", params=["decentdp-accumadamw", "pytorchddp-adamw"])
def finished(launcher: Launcher, request: pytest.FixtureRequest) -> Run:
    """A run of one worker; with decentdp as a user starts it."""
    backend, optimizer = request.param.split("-")
    start = (
        (lambda *args, **options: finish(*launcher.start(*args, **options))) if backend == "decentdp" else launcher.run
    )
    return start(f"train.backend={backend}", f"train.optim.name={optimizer}", env={"SLURM_JOB_ID": "3197816"})


def test_run_leaves_its_files_under_the_slurm_job_id(finished: Run) -> None:
    assert finished.codes == [0], finished.errors
    assert finished.dir.name == "3197816"
    names = {path.name for path in finished.dir.iterdir()}
    assert names == {"train.log", "config.toml", "metrics.jsonl", "best_model.pth", "checkpoint"}


def test_train_log_holds_the_messages_of_rank_0(finished: Run) -> None:
    assert finished.log == finished.errors[0].splitlines()
    assert all(re.match(STAMP + r"\S", line) for line in finished.log)


def test_every_new_best_model_is_logged(finished: Run) -> None:
    best, expected = math.inf, []
    for metrics in finished.metrics:
        expected.append(f"Step {metrics['step']}")
        if metrics["val_loss"] < best:
            best = metrics["val_loss"]
            expected += ["New best model found. Saving...", "Saved model to ./log/3197816/best_model.pth"]
    lines = [re.sub(STAMP, "", line) for line in finished.log if "Saved checkpoint" not in line]  # at its own time
    first = next(i for i, line in enumerate(lines) if line.startswith("Step"))
    assert [line.split(",")[0] for line in lines[first:]] == expected


def test_config_toml_is_the_configuration_of_the_run(finished: Run, launcher: Launcher) -> None:
    read = load_config(finished.dir / "config.toml")
    overrides = [f"data_dir={launcher.corpus}", f"train.backend={read.train.backend}"]
    assert read == load_config(launcher.config, [*overrides, f"train.optim.name={read.train.optim.name}"])


def test_evaluation_lines_hold_the_numbers_of_the_metrics(finished: Run) -> None:
    matches = [EVALUATION.fullmatch(line) for line in finished.log if " Step " in line]
    logged = [
        f"{m['step']} {m['val_loss']:.6f} {m['train_loss']:.6f} "
        f"{m['train_time_s']:.3f} {m['ms_per_step']:.3f} {m['total_train_time_s']:.3f}"
        for m in finished.metrics
    ]
    assert logged == [match and " ".join(match.groups()) for match in matches]


def test_metrics_agree_among_themselves(finished: Run) -> None:
    cfg = load_config(finished.dir / "config.toml")
    assert [m["step"] for m in finished.metrics] == [5, 10, 12]  # at the interval, and the end
    step, total_s = 0, 0.0
    for m in finished.metrics:
        total_s += m["train_time_s"]
        assert m["total_train_time_s"] == pytest.approx(total_s)
        assert m["ms_per_step"] == pytest.approx(m["train_time_s"] / (m["step"] - step) * 1e3)
        assert 0 < m["data_wait_ms"] < m["ms_per_step"]
        assert m["tokens_per_s"] == pytest.approx(BATCH_SIZE * CONTEXT_LENGTH / m["ms_per_step"] * 1e3)
        assert m["lr"] == lr_at(m["step"] - 1, cfg.train.lr_schedule, cfg.train.n_steps)
        assert m["consensus_distance"] == 0.0  # one worker
        step = m["step"]


def test_best_model_has_the_best_loss_of_the_metrics(finished: Run, launcher: Launcher) -> None:
    best = min(finished.metrics, key=lambda metrics: metrics["val_loss"])
    saved = torch.load(finished.dir / "best_model.pth", weights_only=True)
    assert (saved["step"], saved["val_loss"]) == (best["step"], best["val_loss"])
    assert val_loss(saved, launcher) == pytest.approx(best["val_loss"], rel=1e-6)


def val_loss(saved: dict[str, Any], launcher: Launcher) -> float:
    """Loss of a saved model on the batches of an evaluation."""
    gpt = gpt_of(saved)
    dataset = TokenDataset(launcher.corpus, CONTEXT_LENGTH, seed=42)
    batches = [dataset.batch("val", i, slice(BATCH_SIZE), BATCH_SIZE, evaluation=True) for i in range(EVAL_STEPS)]
    with torch.no_grad():
        return sum(gpt(x, y)[1].item() for x, y in batches) / len(batches)


def gpt_of(saved: dict[str, Any]) -> GPT:
    gpt = GPT(ModelConfig(**saved["model_config"]), saved["context_length"]).eval()
    gpt.load_state_dict(saved["model"])
    return gpt


@pytest.mark.fault
def test_best_model_stays_when_the_next_cannot_be_written(launcher: Launcher) -> None:
    full = """
import torch
save = torch.save
def cut(obj, file, *args, **options):
    if obj.get("step", 0) > 5:
        file.write(b"half of it")
        raise OSError(28, os.strerror(28))
    save(obj, file, *args, **options)
torch.save = cut
"""
    run = launcher.run(first=full)
    assert run.codes == [0], run.errors
    assert any("best_model.pth not written, training goes on: " in line for line in run.log)
    assert torch.load(run.dir / "best_model.pth", weights_only=True)["step"] == 5
    assert not [path for path in run.dir.iterdir() if "tmp" in path.name]


def test_metrics_line_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """Under a limit of the file's size a write stops in the middle of a line, as it does on a full disk."""
    path = tmp_path / "metrics.jsonl"
    append_line(path, "a" * 50)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (80, hard))
    try:
        with pytest.raises(OSError, match="No space left"):
            append_line(path, "b" * 50)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    append_line(path, "c")
    assert path.read_text() == "a" * 50 + "\nc\n"


def test_run_name_precedes_the_job_id(launcher: Launcher) -> None:
    run = launcher.run("log.run_name=mine", "train.n_steps=3", env={"SLURM_JOB_ID": "7"})
    assert run.dir.name == "mine"


@pytest.mark.dist
@pytest.mark.parametrize(("nodes", "topology"), [(1, "exp"), (2, "alternating-exp-ring")])
def test_topology_defaults_to_one_that_fits_the_nodes(
    launcher: Launcher, tmp_path: Path, nodes: int, topology: str
) -> None:
    config = tmp_path / "no_topology.toml"
    config.write_text(CONFIG.replace('topology = "exp"\n', ""))
    run = launcher.run("train.n_steps=3", config=config, n=2, nodes=nodes)
    assert run.codes == [0, 0], run.errors
    assert load_config(run.dir / "config.toml").train.topology == topology
    assert any(f"decentdp over {topology}, " in line for line in run.log)


@pytest.mark.timeout(400)  # a compiler that starts from scratch is slow
def test_compiled_run_gives_the_same_losses(launcher: Launcher) -> None:
    plain, compiled = launcher.compare_with(), launcher.run("train.compile=true", timeout_s=350)
    assert compiled.codes == [0], compiled.errors
    np.testing.assert_allclose(compiled.losses, plain.losses, rtol=1e-5)  # fused kernels round differently
    saved = torch.load(compiled.dir / "best_model.pth", weights_only=True)
    assert val_loss(saved, launcher) == pytest.approx(saved["val_loss"], rel=1e-5)


# --- Laws of training ---


@pytest.fixture(scope="module")
def two_workers(launcher: Launcher) -> Run:
    """A run with dropout: the parameters and the random numbers of the workers differ."""
    return launcher.run("model.dropout=0.1", n=2)


@pytest.mark.dist
def test_two_workers_agree_on_a_directory_named_by_time(two_workers: Run) -> None:
    assert two_workers.codes == [0, 0], two_workers.errors
    assert re.fullmatch(r"\d{8}-\d{6}", two_workers.dir.name)
    assert two_workers.errors[1] == ""


@pytest.mark.dist
def test_same_seed_gives_the_same_losses_bit_by_bit(launcher: Launcher, two_workers: Run) -> None:
    assert timeless(launcher.run("model.dropout=0.1", "in_memory=true", n=2)) == timeless(two_workers)


@pytest.mark.dist
def test_another_seed_gives_other_losses(launcher: Launcher, two_workers: Run) -> None:
    assert launcher.run("model.dropout=0.1", "train.seed=43", n=2).losses[0] != two_workers.losses[0]


@pytest.mark.dist
@pytest.mark.parametrize("interval", [1, 100])
def test_evaluation_does_not_disturb_training(launcher: Launcher, two_workers: Run, interval: int) -> None:
    run = launcher.run("model.dropout=0.1", f"log.eval_interval={interval}", n=2)
    assert len(run.metrics) == math.ceil(12 / interval)
    assert timeless(run)[-1] == timeless(two_workers)[-1]


@pytest.mark.dist
def test_all_reduce_does_not_depend_on_the_batch_split(launcher: Launcher) -> None:
    ddp = "train.backend=pytorchddp"
    whole = launcher.run(ddp).losses
    np.testing.assert_allclose(launcher.run(ddp, "train.micro_batch_size=1").losses, whole, rtol=1e-5)
    np.testing.assert_allclose(launcher.run(ddp, "train.micro_batch_size=2", n=2).losses, whole, rtol=1e-4)


@pytest.mark.dist
def test_gossip_does_not_depend_on_the_micro_batches(launcher: Launcher) -> None:
    whole, split = launcher.compare_with(n=2), launcher.run("train.micro_batch_size=1", n=2)
    np.testing.assert_allclose(split.losses, whole.losses, rtol=1e-5)
    assert whole.metrics[0]["consensus_distance"] > 0


@pytest.mark.dist
def test_decentdp_learns_about_as_well_as_all_reduce(launcher: Launcher) -> None:
    steps = ("train.n_steps=60", "log.eval_interval=20")
    ddp = launcher.run("train.backend=pytorchddp", *steps, n=2).losses
    aer = launcher.run("train.topology=alternating-exp-ring", *steps, n=4, nodes=2).losses
    for losses in (ddp, aer):
        assert losses[-1][0] < losses[0][0]
    assert aer[-1][0] == pytest.approx(ddp[-1][0], rel=0.05)


EVAL_FULL = ("log.eval_full=true", "train.n_steps=1", "train.lr_schedule.warmup_steps=0")
UNTRAINED = ("train.lr_schedule.lr=0", "train.lr_schedule.eta_min=0")  # the same model for any batch


def test_eval_full_is_the_mean_over_every_target(launcher: Launcher) -> None:
    run = launcher.compare_with("log.eval_full=true")
    saved = torch.load(run.dir / "best_model.pth", weights_only=True)
    gpt = gpt_of(saved)
    tokens = torch.from_numpy(np.fromfile(launcher.corpus / "val.bin", "<u2").astype(np.int64))
    assert (len(tokens) - 1) % CONTEXT_LENGTH > 0  # the last window is a partial one
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, CONTEXT_LENGTH):
            y = tokens[start + 1 : start + CONTEXT_LENGTH + 1]
            total += gpt(tokens[None, start : start + len(y)], y[None])[1].item() * len(y)
    assert saved["val_loss"] == pytest.approx(total / (len(tokens) - 1), rel=1e-6)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("backend", "n", "batch", "micro_batch"),
    [("decentdp", 2, 6, 1), pytest.param("pytorchddp", 4, 400, 100, id="one worker has it all")],
)
def test_eval_full_depends_on_neither_workers_nor_batch(
    launcher: Launcher, backend: str, n: int, batch: int, micro_batch: int
) -> None:
    sizes = (f"train.global_batch_size={batch}", f"train.micro_batch_size={micro_batch}", f"train.backend={backend}")
    run = launcher.run(*EVAL_FULL, *UNTRAINED, *sizes, n=n)
    assert run.codes == [0] * n, run.errors
    one = launcher.compare_with(*EVAL_FULL, *UNTRAINED)
    assert run.losses[-1][0] == pytest.approx(one.losses[-1][0], rel=1e-6)


def test_eval_full_does_not_change_training(launcher: Launcher) -> None:
    sampled, full = launcher.compare_with(), launcher.compare_with("log.eval_full=true")
    assert [m["train_loss"] for m in full.metrics] == [m["train_loss"] for m in sampled.metrics]
    assert [m["val_loss"] for m in full.metrics] != [m["val_loss"] for m in sampled.metrics]


def test_every_evaluation_draws_the_same_windows(launcher: Launcher) -> None:
    run = launcher.run(*UNTRAINED, "train.lr_schedule.warmup_steps=0")
    assert len(set(run.losses)) == 1
    assert len(run.losses) == 3


# --- Failures: exit code 1 ---


@pytest.mark.dist
def test_infinite_loss_between_evaluations_ends_all_ranks(launcher: Launcher) -> None:
    overrides = ("train.lr_schedule.lr=1e10", "train.grad_norm_clip=0", "log.eval_interval=100")
    run = launcher.run(*overrides, n=2, timeout_s=40)
    assert run.codes == [1, 1], run.errors
    errors = "".join(run.errors)
    assert re.search(r"the loss is (nan|inf) at step 10\b.*train\.lr_schedule\.lr", errors)
    assert "Traceback" not in errors


def test_infinite_loss_is_trained_on_without_stop_on_nan(launcher: Launcher) -> None:
    run = launcher.run("train.lr_schedule.lr=1e10", "train.grad_norm_clip=0", "train.stop_on_nan=false")
    assert run.codes == [1], run.errors  # a state with nan in it is not saved
    assert run.metrics[-1]["step"] == 12
    assert not math.isfinite(run.metrics[-1]["val_loss"])


@pytest.mark.dist
def test_rank_that_ends_alone_leaves_no_other_waiting(launcher: Launcher) -> None:
    only_rank_1 = "import math; env['RANK'] == '1' and setattr(math, 'isfinite', lambda _: False)"
    run = launcher.run("log.eval_interval=100", n=2, first=only_rank_1, timeout_s=40)
    assert run.codes == [1, 1], run.errors
    assert "rank 1: the loss is" in run.errors[1]
    assert re.search(r"after step \d+: rank 1 ended: the loss is \S+ at step 10: ", run.log[-1]), run.log


@pytest.mark.fault
@pytest.mark.dist
@pytest.mark.parametrize(
    ("agent_store", "message"),
    [("True", "timed out waiting for rank 1: "), ("False", "the 2 workers did not meet: ")],
    ids=["torchrun", "no torchrun"],
)
def test_rank_that_does_not_come_is_named_after_the_timeout(launcher: Launcher, agent_store: str, message: str) -> None:
    absent = f"""
import decent.liveness
decent.liveness.Liveness.TIMEOUT_S = 1
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "{agent_store}"
if not {agent_store}:
    os.environ["MASTER_PORT"] = "{free_port()}"
if os.environ["RANK"] == "1":
    os._exit(0)
"""
    run = launcher.run("train.timeout_s=1", n=2, first=absent, timeout_s=20)
    assert run.codes == [1, 0], run.errors
    [line] = [line for line in run.errors[0].splitlines() if "ERROR" in line]
    assert f"at the start: {message}" in line
    assert "Traceback" not in run.errors[0]


def limit_file_size(n_bytes: int) -> str:
    """Python under which no file grows beyond n_bytes, as on a full disk."""
    return f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({n_bytes}, {n_bytes}))"


@pytest.mark.fault
@pytest.mark.dist
def test_unsaved_end_is_exit_code_1_which_prevents_requeueing(launcher: Launcher) -> None:
    run = launcher.run(n=2, first=limit_file_size(64_000), timeout_s=40)  # enough for best_model.pth
    assert run.codes == [1, 1], run.errors
    assert "checkpoint of step 12 not saved" in run.errors[0]


@pytest.mark.dist
@pytest.mark.fault
def test_truncated_token_file_ends_the_run(launcher: Launcher, tmp_path: Path) -> None:
    for split in ("train", "val"):
        np.zeros(100_000, "<u2").tofile(tmp_path / f"{split}.bin")
    at_step_3 = f"""
import time, torch
from decent.run_log import RunLog
def progress(self, step, loss):
    if step == 3:
        torch.distributed.barrier()
        time.sleep(0.1)  # nothing is read ahead now: a page that is cut off between look and read is a SIGBUS
        os.truncate({str(tmp_path / "train.bin")!r}, 2000)
RunLog.progress = progress
"""
    run = launcher.run(f"data_dir={tmp_path}", n=2, first=at_step_3, timeout_s=30)
    assert 2 in run.codes, run.errors
    for rank, (code, errors) in enumerate(zip(run.codes, run.errors, strict=True)):
        if code == 2:
            [line] = [line for line in errors.splitlines() if "train.bin: " in line]
            assert "held 100000 tokens when training started, and holds 1000 now" in line
        else:  # it learned first that the other rank has left
            assert code == 1, errors
            assert f"rank {1 - rank}" in errors
    assert "Traceback" not in "".join(run.errors)


# --- Mistakes: exit code 2, one line, nothing written ---


def assert_refused(run: Run, *parts: str) -> None:
    lines = "".join(run.errors).splitlines()
    assert run.codes == [2] * len(run.codes), run.errors
    assert len(lines) == 1, lines
    assert re.match(r"\[\d\d:\d\d:\d\d ERROR\] ", lines[0])
    assert [part for part in parts if part not in lines[0]] == [], lines[0]
    assert not run.log_dir.exists()


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.n_step=5", ["unknown key train.n_step;", '"train.n_steps"']),
        ("train.micro_batch_size=3", ["train.global_batch_size = 8", "1 workers x micro_batch_size = 3", "6 would be"]),
        ("train.topology=alternating-exp-ring", ["1 node x 1 worker", '"exp", "ring" or "complete"']),
        ("dataset=moon", ['dataset = "moon"', "openwebtext, sotu"]),
        ("model.vocab_size=100", ["train.bin", "token id", "model.vocab_size = 100", "at least"]),
        ("data_dir=absent", ["absent/train.bin: no such file; make it with `python "]),
        ("log.wandb_log=true", ["log.wandb_log", "WANDB_MODE=offline", "`wandb login`"]),
    ],
)
def test_invalid_input_is_refused(launcher: Launcher, override: str, parts: list[str]) -> None:
    assert_refused(launcher.run(override), *parts)


def test_missing_configuration_is_refused(launcher: Launcher, tmp_path: Path) -> None:
    assert_refused(launcher.run(config=tmp_path / "absent.toml"), "absent.toml: no such configuration file")


def test_key_that_wandb_rejects_is_refused(launcher: Launcher) -> None:
    run = launcher.run("log.wandb_log=true", env={"WANDB_API_KEY": "short"})
    assert_refused(run, "log.wandb_log", "WANDB_MODE=offline")


def test_log_dir_that_is_a_file_is_refused(launcher: Launcher, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = launcher.run(f"log_dir={tmp_path / 'file'}")
    assert_refused(run, f'log_dir = "{tmp_path / "file"}": ', " cannot be written: Not a directory")


def test_full_disk_at_the_start_is_refused(launcher: Launcher) -> None:
    run = launcher.run("log.run_name=run", first=limit_file_size(500))
    assert run.codes == [2], run.errors
    [line] = run.errors[0].splitlines()
    assert 'log_dir = "./log": log/run cannot be written: File too large' in line
    assert not list(run.dir.iterdir())


@pytest.mark.dist
@pytest.mark.parametrize(
    ("override", "in_memory", "part"),
    [
        ("train.n_step=3", "false", "unknown key train.n_step"),
        ("data_dir=/absent", "false", "/absent/train.bin: no such file"),
        ("data_dir=/absent", "true", "/absent/train.bin: no such file"),
    ],
)
def test_mistake_on_one_rank_ends_all_and_names_it(
    launcher: Launcher, override: str, in_memory: str, part: str
) -> None:
    run = launcher.run(f"in_memory={in_memory}", n=2, last_rank=(override,), timeout_s=30)
    assert_refused(run, "rank 1 on ", part)


NO_MEMORY = "import data.node_memory; data.node_memory.available_bytes = lambda root: 1000"
FULL_MEMORY = "os.memfd_create = lambda name: os.open('/dev/full', os.O_RDWR)"


@pytest.mark.dist
@pytest.mark.parametrize(
    ("first", "part"),
    [(NO_MEMORY, "takes 0.00 GB, but 0.00 GB are available"), (FULL_MEMORY, "No space left on device")],
    ids=["seen before", "seen while loading"],
)
def test_corpus_larger_than_the_memory_is_refused(launcher: Launcher, first: str, part: str) -> None:
    run = launcher.run("in_memory=true", n=2, first=first, timeout_s=30)
    assert_refused(run, "in_memory = true: the corpus in ", part, "set in_memory = false")


@pytest.mark.dist
def test_more_workers_than_gpus_are_refused(launcher: Launcher) -> None:
    one_gpu = "torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1"
    assert_refused(launcher.run(n=2, first=one_gpu), "2 workers on a node with 1 GPUs", "--nproc_per_node")


@pytest.mark.dist
def test_torchrun_shows_one_line_and_exit_code_2(launcher: Launcher) -> None:
    run = finish(*launcher.start("train.global_batch_size=7", n=2))
    [errors] = run.errors
    assert run.codes != [0]
    assert errors.count("train.global_batch_size = 7 is not divisible by 2 workers; 6 would be") == 1
    assert errors.count(" ERROR] ") == 1
    assert re.search(r"exitcode  : 2\b", errors.partition("Root Cause")[2])
    assert not run.log_dir.exists()


def test_folder_of_token_files_alone_is_a_corpus(launcher: Launcher, tmp_path: Path) -> None:
    """nanoGPT's own folders have no meta.json; here one is under data/ of another copy of the program."""
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").symlink_to(launcher.corpus)
    run = launcher.run("dataset=mine", "train.n_steps=3", train_py=tmp_path / "train.py")
    assert run.codes == [0], run.errors
