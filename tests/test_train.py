"""train.py as a user starts it: the run directory, the laws of training that a whole run must keep, and every mistake.

Most runs fork from a server that has imported torch and wandb once (0.3 s instead of 3 s each); a run that starts as
`python train.py` and those under torchrun must give the same.
"""

import math
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from config import ModelConfig, load_config
from data.loader import TokenDataset
from model import GPT
from optim import lr_at
from report import append_line
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


@pytest.fixture(
    scope="module",
    params=[(backend, name) for backend in ("decentdp", "pytorchddp") for name in ("accumadamw", "adamw")],
    ids="-".join,
)
def finished(launcher: Launcher, request: pytest.FixtureRequest) -> Run:
    backend, optimizer = request.param
    overrides = (f"train.backend={backend}", f"train.optim.name={optimizer}")
    env = {"SLURM_JOB_ID": "3197816"}
    if request.param == ("decentdp", "accumadamw"):
        return finish(*launcher.start(*overrides, env=env))
    return launcher.run(*overrides, env=env)


def test_a_run_ends_with_exit_code_0_and_all_files_under_the_slurm_job_id(finished: Run) -> None:
    assert finished.codes == [0], finished.errors
    assert finished.dir.name == "3197816"
    assert {path.name for path in finished.dir.iterdir()} >= {
        "train.log",
        "config.toml",
        "metrics.jsonl",
        "best_model.pth",
    }
    assert not list(finished.dir.glob("*.tmp"))


def test_train_log_is_what_rank_0_said(finished: Run) -> None:
    assert finished.log == finished.errors[0].splitlines()
    assert all(re.match(STAMP + r"\S", line) for line in finished.log)


def test_evaluation_lines_have_the_one_format_and_are_at_the_interval_and_the_end(finished: Run) -> None:
    matches = [EVALUATION.fullmatch(line) for line in finished.log if " Step " in line]
    assert [match and int(match[1]) for match in matches] == [5, 10, 12]


def test_every_new_best_model_is_told_and_saved(finished: Run) -> None:
    best, expected = math.inf, []
    for metrics in finished.metrics:
        expected.append(f"Step {metrics['step']}")
        if metrics["val_loss"] < best:
            best = metrics["val_loss"]
            expected += ["New best model found. Saving...", "Saved model to ./log/3197816/best_model.pth"]
    said = [re.sub(STAMP, "", line) for line in finished.log if "Saved checkpoint" not in line]  # at its own time
    first = next(i for i, line in enumerate(said) if line.startswith("Step"))
    assert [line.split(",")[0] for line in said[first:]] == expected


def test_config_toml_is_the_whole_configuration_of_the_run(finished: Run, launcher: Launcher) -> None:
    read = load_config(finished.dir / "config.toml")
    overrides = [f"data_dir={launcher.corpus}", f"train.backend={read.train.backend}"]
    overrides += [f"train.optim.name={read.train.optim.name}"]
    assert read == load_config(launcher.config, overrides)


def test_metrics_are_the_numbers_of_the_log(finished: Run) -> None:
    matches = [match for line in finished.log if (match := EVALUATION.fullmatch(line))]
    logged = [
        f"{m['step']} {m['val_loss']:.6f} {m['train_loss']:.6f} "
        f"{m['train_time_s']:.3f} {m['ms_per_step']:.3f} {m['total_train_time_s']:.3f}"
        for m in finished.metrics
    ]
    assert logged == [" ".join(match.groups()) for match in matches]


def test_metrics_agree_among_themselves(finished: Run) -> None:
    cfg = load_config(finished.dir / "config.toml")
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


def test_best_model_has_the_best_loss_of_the_metrics_on_the_same_batches(finished: Run, launcher: Launcher) -> None:
    best = min(finished.metrics, key=lambda metrics: metrics["val_loss"])
    saved = torch.load(finished.dir / "best_model.pth", weights_only=True)
    assert (saved["step"], saved["val_loss"]) == (best["step"], best["val_loss"])
    assert val_loss(saved, launcher) == pytest.approx(best["val_loss"], rel=1e-6)


@pytest.mark.fault
def test_a_best_model_that_cannot_be_written_leaves_the_one_before(launcher: Launcher) -> None:
    full = """
import torch
save = torch.save
def cut(obj, file, *args, **options):
    if obj.get("step", 0) > 5:
        (file if hasattr(file, "write") else open(file, "wb")).write(b"half of it")
        raise OSError(28, os.strerror(28))
    save(obj, file, *args, **options)
torch.save = cut
"""
    run = launcher.run(first=full)
    assert run.codes == [0], run.errors
    assert any("best_model.pth not written, training goes on: " in line for line in run.log)
    assert torch.load(run.dir / "best_model.pth", weights_only=True)["step"] == 5
    assert not list(run.dir.glob("*.tmp"))


def val_loss(saved: dict[str, Any], launcher: Launcher) -> float:
    gpt = GPT(ModelConfig(**saved["model_config"]), saved["context_length"]).eval()
    gpt.load_state_dict(saved["model"])
    dataset = TokenDataset(launcher.corpus, CONTEXT_LENGTH, seed=42)
    batches = [dataset.batch("val", i, slice(BATCH_SIZE), BATCH_SIZE, evaluation=True) for i in range(EVAL_STEPS)]
    with torch.no_grad():
        losses = [gpt(x, y)[1].item() for x, y in batches]
    return sum(losses) / len(losses)


def test_a_run_name_goes_before_the_job_id(launcher: Launcher) -> None:
    run = launcher.run("log.run_name=mine", "train.n_steps=3", env={"SLURM_JOB_ID": "7"})
    assert run.dir.name == "mine"


def test_wandb_offline_leaves_its_run_in_the_run_directory(launcher: Launcher) -> None:
    run = launcher.run("log.wandb_log=true", env={"WANDB_MODE": "offline"})
    assert run.codes == [0], run.errors
    assert len(list(run.dir.glob("wandb/offline-run-*/*.wandb"))) == 1


@pytest.mark.timeout(400)  # where the compiler starts from scratch
def test_a_compiled_run_gives_the_same_losses(launcher: Launcher) -> None:
    plain, compiled = (launcher.run(f"train.compile={on}", timeout_s=250) for on in ("false", "true"))
    assert compiled.codes == [0], compiled.errors
    np.testing.assert_allclose(compiled.losses, plain.losses, rtol=1e-5)  # fused kernels round differently
    saved = torch.load(compiled.dir / "best_model.pth", weights_only=True)
    assert val_loss(saved, launcher) == pytest.approx(saved["val_loss"], rel=1e-5)


# --- Laws of training ---


@pytest.fixture(scope="module")
def two_workers(launcher: Launcher) -> Run:
    """decentdp with dropout: the parameters and the random numbers of the workers differ."""
    return launcher.run("model.dropout=0.1", n=2)


@pytest.mark.dist
def test_two_workers_agree_on_one_directory_named_by_the_time(two_workers: Run) -> None:
    assert two_workers.codes == [0, 0], two_workers.errors
    assert re.fullmatch(r"\d{8}-\d{6}", two_workers.dir.name)
    assert two_workers.errors[1] == ""


@pytest.mark.dist
@pytest.mark.parametrize("how", ["again", "in memory", "torchrun"])
def test_the_same_seed_gives_the_same_losses_bit_for_bit(launcher: Launcher, two_workers: Run, how: str) -> None:
    overrides = ("model.dropout=0.1", f"in_memory={str(how == 'in memory').lower()}")
    run = finish(*launcher.start(*overrides, n=2)) if how == "torchrun" else launcher.run(*overrides, n=2)
    assert timeless(run) == timeless(two_workers)


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
def test_the_batch_is_the_same_however_it_is_split_with_all_reduce(launcher: Launcher) -> None:
    ddp = "train.backend=pytorchddp"
    whole = launcher.run(ddp).losses
    np.testing.assert_allclose(launcher.run(ddp, "train.micro_batch_size=1").losses, whole, rtol=1e-5)
    np.testing.assert_allclose(launcher.run(ddp, n=2).losses, whole, rtol=1e-4)
    np.testing.assert_allclose(launcher.run(ddp, "train.micro_batch_size=2", n=2).losses, whole, rtol=1e-4)


EVAL_FULL = ("log.eval_full=true", "train.n_steps=1", "train.lr_schedule.warmup_steps=0")
UNTRAINED = ("train.lr_schedule.lr=0", "train.lr_schedule.eta_min=0")  # the same model for any batch


@pytest.fixture(scope="module")
def eval_full(launcher: Launcher) -> Run:
    return launcher.run(*EVAL_FULL, *UNTRAINED)


def test_eval_full_is_the_mean_over_every_target_of_val(launcher: Launcher) -> None:
    run = launcher.run("log.eval_full=true")
    assert run.codes == [0], run.errors
    saved = torch.load(run.dir / "best_model.pth", weights_only=True)
    gpt = GPT(ModelConfig(**saved["model_config"]), saved["context_length"]).eval()
    gpt.load_state_dict(saved["model"])
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
    [
        ("decentdp", 1, 3, 1),
        ("decentdp", 2, 8, 1),
        ("pytorchddp", 4, 12, 3),
        pytest.param("pytorchddp", 4, 400, 100, id="one has it all"),
    ],
)
def test_eval_full_is_the_same_for_any_number_of_workers_and_any_batch(
    launcher: Launcher, eval_full: Run, backend: str, n: int, batch: int, micro_batch: int
) -> None:
    sizes = (f"train.global_batch_size={batch}", f"train.micro_batch_size={micro_batch}", f"train.backend={backend}")
    run = launcher.run(*EVAL_FULL, *UNTRAINED, *sizes, n=n)
    assert run.codes == [0] * n, run.errors
    assert run.losses[-1][0] == pytest.approx(eval_full.losses[-1][0], rel=1e-6)


def test_eval_full_leaves_training_and_its_loss_as_they_are(launcher: Launcher) -> None:
    sampled, full = launcher.run(), launcher.run("log.eval_full=true")
    assert [m["train_loss"] for m in full.metrics] == [m["train_loss"] for m in sampled.metrics]
    assert [m["val_loss"] for m in full.metrics] != [m["val_loss"] for m in sampled.metrics]


def test_sampled_validation_draws_the_same_windows_in_each_evaluation(launcher: Launcher) -> None:
    run = launcher.run(*UNTRAINED, "train.lr_schedule.warmup_steps=0")
    assert len(set(run.losses)) == 1
    assert len(run.losses) == 3


@pytest.mark.dist
def test_micro_batches_change_nothing_with_decentdp(launcher: Launcher) -> None:
    whole, split = launcher.run(n=2), launcher.run("train.micro_batch_size=1", n=2)
    np.testing.assert_allclose(split.losses, whole.losses, rtol=1e-5)
    assert whole.metrics[0]["consensus_distance"] > 0


@pytest.mark.dist
@pytest.mark.parametrize("topology", ["complete", "ring"])
def test_with_two_workers_all_topologies_are_one(launcher: Launcher, topology: str) -> None:
    run, exp = launcher.run(f"train.topology={topology}", n=2), launcher.run("train.topology=exp", n=2)
    assert timeless(run) == timeless(exp)


@pytest.mark.dist
def test_decentdp_trains_about_as_well_as_all_reduce(launcher: Launcher) -> None:
    steps = ("train.n_steps=60", "log.eval_interval=20")
    ddp = launcher.run("train.backend=pytorchddp", *steps, n=2).losses
    exp = launcher.run(*steps, n=2).losses
    aer = launcher.run("train.topology=alternating-exp-ring", *steps, n=4, nodes=2).losses
    for losses in (ddp, exp, aer):
        assert losses[-1][0] < losses[0][0]
    for losses in (exp, aer):
        assert losses[-1][0] == pytest.approx(ddp[-1][0], rel=0.05)


@pytest.mark.dist
@pytest.mark.parametrize(("n", "interval", "step"), [(1, 5, 5), (2, 100, 10)], ids=["evaluation", "check"])
def test_a_loss_that_is_not_finite_ends_the_run_with_exit_code_1_and_a_line_that_says_so(
    launcher: Launcher, n: int, interval: int, step: int
) -> None:
    overrides = ("train.lr_schedule.lr=1e10", "train.grad_norm_clip=0", f"log.eval_interval={interval}")
    run = launcher.run(*overrides, n=n, timeout_s=40)
    assert run.codes == [1] * n, run.errors
    lines = "".join(run.errors).splitlines()
    assert any(re.search(rf"the loss is (nan|inf) at step {step}\b.*train\.lr_schedule\.lr", line) for line in lines)
    assert not any("Traceback" in line for line in lines)


@pytest.mark.dist
def test_the_log_says_why_another_worker_ended(launcher: Launcher) -> None:
    only_here = """
import report
require_finite = report.Report.require_finite
if os.environ["RANK"] == "1":
    report.Report.require_finite = lambda self, loss, step: require_finite(self, float("nan"), step)
"""
    run = launcher.run(n=2, first=only_here, timeout_s=40)
    assert run.codes == [1, 1], run.errors
    assert re.search(r"after step \d+: rank 1 ended: the loss is nan at step \d+: ", run.log[-1]), run.log


def test_without_stop_on_nan_the_run_goes_to_its_end(launcher: Launcher) -> None:
    run = launcher.run("train.lr_schedule.lr=1e10", "train.grad_norm_clip=0", "train.stop_on_nan=false")
    assert run.codes == [1], run.errors  # a state with nan in it is not saved
    assert run.metrics[-1]["step"] == 12
    assert not math.isfinite(run.metrics[-1]["val_loss"])


@pytest.mark.dist
def test_a_loss_that_is_not_finite_on_one_worker_leaves_no_other_waiting(launcher: Launcher) -> None:
    only_rank_1 = "import math; env['RANK'] == '1' and setattr(math, 'isfinite', lambda _: False)"
    run = launcher.run("log.eval_interval=100", n=2, first=only_rank_1, timeout_s=40)
    assert run.codes[1] == 1, run.errors
    assert "rank 1: the loss is" in run.errors[1]
    assert run.codes[0] not in (0, -9), run.errors


@pytest.mark.fault
@pytest.mark.dist
@pytest.mark.parametrize(
    ("agent_store", "message"),
    [("True", "waited in vain for rank 1: "), ("False", "the 2 workers did not meet: ")],
    ids=["torchrun", "no torchrun"],
)
def test_a_worker_that_does_not_come_is_waited_for_until_the_timeout(
    launcher: Launcher, agent_store: str, message: str
) -> None:
    late = f"""
import decent.liveness
decent.liveness.Liveness.TIMEOUT_S = 1
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "{agent_store}"
if not {agent_store}:
    os.environ["MASTER_PORT"] = "{free_port()}"
if os.environ["RANK"] == "1":
    time.sleep(4)
    os._exit(0)
"""
    run = launcher.run("train.timeout_s=1", n=2, first=late, timeout_s=20)
    assert run.codes == [1, 0], run.errors
    (line,) = [line for line in run.errors[0].splitlines() if "ERROR" in line]
    assert f"at the start: {message}" in line
    assert "Traceback" not in run.errors[0]


@pytest.mark.fault
@pytest.mark.dist
def test_a_run_whose_end_could_not_be_saved_has_exit_code_1_or_its_job_would_be_requeued_forever(
    launcher: Launcher,
) -> None:
    full = "import os\ndef fsync(_): raise OSError(28, 'No space left on device')\nos.fsync = fsync"
    run = launcher.run(n=2, first=full, timeout_s=40)
    assert run.codes == [1, 1], run.errors
    assert "checkpoint of step 12 not saved" in run.errors[0]


# --- Mistakes: exit code 2, one line, nothing written ---


def assert_refused(run: Run, *parts: str) -> None:
    lines = "".join(run.errors).splitlines()
    assert run.codes == [2] * len(run.codes), run.errors
    assert len(lines) == 1, lines
    assert re.match(r"\[\d\d:\d\d:\d\d ERROR\] ", lines[0])
    assert [part for part in parts if part not in lines[0]] == [], lines[0]
    assert not run.log_dir.exists()


def test_a_missing_configuration_is_refused_by_plain_python(launcher: Launcher) -> None:
    config = launcher.folder / "absent.toml"
    assert_refused(finish(*launcher.start(config=config)), f"{config}: no such configuration file")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        pytest.param("[train\nseed = 1", ["line 1", "[train"], id="syntax"),
        pytest.param("[train]\nn_step = 5", ["unknown key train.n_step;", '"train.n_steps"'], id="unknown key"),
        pytest.param('[train]\nn_steps = "5"', ["train.n_steps = '5'", "integer"], id="wrong type"),
    ],
)
def test_a_wrong_configuration_is_refused(launcher: Launcher, tmp_path: Path, text: str, parts: list[str]) -> None:
    config = tmp_path / "wrong.toml"
    config.write_text(text)
    assert_refused(launcher.run(config=config), f"{config}: ", *parts)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        pytest.param(
            ["train.micro_batch_size=3"],
            ["train.global_batch_size = 8", "1 workers x micro_batch_size = 3", "6 would be"],
            id="indivisible batch",
        ),
        pytest.param(["train.topology=star"], ["train.topology = 'star'", "'exp'", "'ring'"], id="unknown topology"),
        pytest.param(
            ["train.topology=alternating-exp-ring"],
            ['train.topology = "alternating-exp-ring"', "1 node x 1 worker", '"exp", "ring" or "complete"'],
            id="AER on one node",
        ),
        pytest.param(["model.n_heads=3"], ["n_embd = 16", "n_heads = 3"], id="heads"),
        pytest.param(["train.lr_schedule.warmup_steps=12"], ["warmup_steps = 12", "n_steps = 12"], id="warm-up"),
        pytest.param(["dataset=moon"], ['dataset = "moon"', "openwebtext, sotu"], id="unknown dataset"),
        pytest.param(
            ["model.vocab_size=100"], ["train.bin", "token id", "model.vocab_size = 100", "at least"], id="ids"
        ),
        pytest.param(["train.context_length=1000"], ["val.bin: holds 1000 tokens", "at most 999"], id="short file"),
        pytest.param(["log.wandb_log=true"], ["log.wandb_log", "WANDB_MODE=offline", "`wandb login`"], id="no login"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(launcher: Launcher, overrides: list[str], parts: list[str]) -> None:
    assert_refused(launcher.run(*overrides), *parts)


def test_a_folder_of_token_files_alone_is_a_corpus(launcher: Launcher, tmp_path: Path) -> None:
    """As nanoGPT's own, under data/ of a copy of the repository."""
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").symlink_to(launcher.corpus)
    command = [sys.executable, "train.py", str(launcher.config), "dataset=mine"]
    env = launcher.environment(tmp_path, None)
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("content", "part"),
    [
        pytest.param(None, "no such file; make it with `python data/sotu/prepare.py", id="missing"),
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b"\0" * 4001, "4001 bytes is not a whole number of 2-byte tokens", id="odd length"),
        pytest.param(b"\0" * 32, "holds 16 tokens, but one window of train.context_length = 16 takes 17", id="short"),
    ],
)
def test_a_bad_token_file_is_refused(launcher: Launcher, tmp_path: Path, content: bytes | None, part: str) -> None:
    corpus = tmp_path / "sotu"
    corpus.mkdir()
    (corpus / "val.bin").write_bytes((launcher.corpus / "val.bin").read_bytes())
    if content is not None:
        (corpus / "train.bin").write_bytes(content)
    assert_refused(launcher.run(f"data_dir={corpus}"), f"{corpus / 'train.bin'}: ", part)


def test_a_data_folder_without_permission_is_refused(launcher: Launcher) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        closed, config = Path(folder) / "closed", Path(folder) / "small.toml"
        closed.mkdir(mode=0)
        config.write_text(CONFIG)
        Path(folder).chmod(0o755)
        run = launcher.run(f"data_dir={closed}", config=config, first=BECOME_NOBODY)
    assert_refused(run, f"{closed / 'train.bin'}: no permission to read it")


# root may read anything. The imports come before the switch: the installation's files may be root's alone.
BECOME_NOBODY = """
import runpy
runpy.run_path(argv[0], run_name="imported")
os.geteuid() or os.setuid(65534)
"""


def test_a_log_dir_that_is_a_file_is_refused(launcher: Launcher, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = launcher.run(f"log_dir={tmp_path / 'file'}")
    assert_refused(run, f'log_dir = "{tmp_path / "file"}": ', " cannot be written: Not a directory")


def test_a_full_disk_at_the_start_is_refused(launcher: Launcher) -> None:
    full = """
import os, pathlib
write_text = pathlib.Path.write_text
def fill(self, text, *args, **options):
    write_text(self, text[:5], *args, **options)
    raise OSError(28, os.strerror(28))
pathlib.Path.write_text = fill
"""
    run = launcher.run("log.run_name=run", first=full)
    assert run.codes == [2], run.errors
    (line,) = run.errors[0].splitlines()
    assert 'log_dir = "./log": log/run cannot be written: No space left on device' in line
    assert not list(run.dir.iterdir())


def test_a_key_that_wandb_does_not_take_is_refused(launcher: Launcher) -> None:
    run = launcher.run("log.wandb_log=true", env={"WANDB_API_KEY": "short"})
    assert_refused(run, "log.wandb_log", "WANDB_MODE=offline")


@pytest.mark.dist
@pytest.mark.parametrize(
    ("override", "part"),
    [
        pytest.param("train.n_step=3", "unknown key train.n_step", id="configuration"),
        pytest.param("data_dir=/absent", "/absent/train.bin: no such file", id="token file"),
        pytest.param("train.context_length=5000", "train.bin: holds 4000 tokens", id="short file"),
    ],
)
@pytest.mark.parametrize("in_memory", ["false", "true"])
def test_a_mistake_on_one_worker_alone_ends_all_and_names_the_rank(
    launcher: Launcher, override: str, part: str, in_memory: str
) -> None:
    run = launcher.run(f"in_memory={in_memory}", n=2, last_rank=(override,), timeout_s=30)
    assert_refused(run, "rank 1 on ", part)


NO_MEMORY = "import data.node_memory; data.node_memory.available_bytes = lambda root: 1000"
FULL_MEMORY = "os.memfd_create = lambda name: os.open('/dev/full', os.O_RDWR)"


@pytest.mark.dist
@pytest.mark.parametrize(
    ("n", "first", "part"),
    [
        pytest.param(2, NO_MEMORY, "takes 0.00 GB, but 0.00 GB are available", id="seen before"),
        pytest.param(1, FULL_MEMORY, "No space left on device", id="seen while loading"),
        pytest.param(2, FULL_MEMORY, "No space left on device", id="seen while loading for two"),
    ],
)
def test_memory_too_small_for_the_corpus_is_refused(launcher: Launcher, n: int, first: str, part: str) -> None:
    run = launcher.run("in_memory=true", n=n, first=first, timeout_s=30)
    assert_refused(run, "in_memory = true: the corpus in ", part, "set in_memory = false")


@pytest.mark.dist
@pytest.mark.fault
def test_a_token_file_that_is_cut_while_training_ends_the_run_with_a_line_and_exit_code_2(
    launcher: Launcher, tmp_path: Path
) -> None:
    for split in ("train", "val"):
        np.zeros(100_000, "<u2").tofile(tmp_path / f"{split}.bin")
    at_step_3 = f"""
import report, torch
def progress(self, step, loss):
    if step == 3:
        torch.distributed.barrier()
        time.sleep(0.1)  # nobody reads ahead now: a page that is cut off between look and read is a SIGBUS
        os.truncate({str(tmp_path / "train.bin")!r}, 2000)
report.Report.progress = progress
"""
    run = launcher.run(f"data_dir={tmp_path}", n=2, first=at_step_3, timeout_s=30)
    assert 2 in run.codes, run.errors
    for rank, (code, errors) in enumerate(zip(run.codes, run.errors, strict=True)):
        if code == 2:
            [line] = [line for line in errors.splitlines() if "train.bin: " in line]
            assert "held 100000 tokens when training started, and holds 1000 now" in line
        else:  # it learned first that the other has left
            assert code == 1, errors
            assert f"rank {1 - rank}" in errors
    assert "Traceback" not in "".join(run.errors)


@pytest.mark.dist
def test_more_workers_than_gpus_are_refused(launcher: Launcher) -> None:
    one_gpu = "torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1"
    assert_refused(launcher.run(n=2, first=one_gpu), "2 workers on a node with 1 GPUs", "--nproc_per_node")


@pytest.mark.dist
def test_torchrun_ends_with_our_one_line_and_exit_code_2_of_each_worker(launcher: Launcher) -> None:
    processes = {
        "absent.toml: no such configuration file": launcher.start(n=2, config=launcher.folder / "absent.toml"),
        "train.global_batch_size = 7 is not divisible by 2 workers; 6 would be": launcher.start(
            "train.global_batch_size=7", n=2
        ),
        "/absent/train.bin: no such file": launcher.start("data_dir=/absent", n=2),
    }
    runs = {message: finish(*started) for message, started in processes.items()}
    for message, run in runs.items():
        (errors,) = run.errors
        assert run.codes != [0]
        assert errors.count(message) == 1
        assert errors.count(" ERROR] ") == 1
        assert re.search(r"exitcode  : (\S+)", errors.partition("Root Cause")[2])[1] == "2"  # type: ignore[index]
        assert not run.log_dir.exists()


def test_a_line_of_metrics_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
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
