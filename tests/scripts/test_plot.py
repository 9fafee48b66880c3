"""scripts/plot.py: what it reads from run directories, and the image it leaves."""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.image
import pytest

from scripts import plot

SCRIPT = Path(plot.__file__)
matplotlib.use("Agg")


def write_run(directory: Path, backend: str = "decentdp", steps: tuple[int, ...] = (0, 10, 20, 30)) -> Path:
    directory.mkdir()
    (directory / "config.toml").write_text(
        f'[train]\nbackend = "{backend}"\ntopology = "exp"\n[train.optim]\nname = "accumadamw"\n', encoding="utf-8"
    )
    lines = [evaluation(step) for step in steps]
    (directory / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return directory


def evaluation(step: int, val_loss: float | None = None) -> str:
    val_loss = 3 + 8 / (step + 1) if val_loss is None else val_loss
    values = {"step": step, "val_loss": val_loss, "train_loss": val_loss - 0.01, "total_train_time_s": 0.2 * step}
    return json.dumps({**values, "ms_per_step": 200.0, "lr": 1e-3, "tokens_per_s": 1e5}) + "\n"


def run_plot(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_image_is_written_into_the_first_run(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", backend="pytorchddp")
    result = run_plot(a, b)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{a / 'loss.png'}\n", "")
    image = matplotlib.image.imread(a / "loss.png")
    assert image.shape[:2] == (825, 1350)
    assert image.std() > 0.05  # it is not empty


def test_options_change_the_image_and_its_place(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    assert plot.main([str(run), "--out", str(tmp_path / "step.png")]) == 0
    assert plot.main([str(run), "--out", str(tmp_path / "time.png"), "--x", "time"]) == 0
    assert (tmp_path / "step.png").read_bytes() != (tmp_path / "time.png").read_bytes()
    assert not (run / "loss.png").exists()


@pytest.mark.parametrize(
    ("backend", "label"), [("decentdp", "a: decentdp, exp, accumadamw"), ("pytorchddp", "a: pytorchddp, accumadamw")]
)
def test_label_names_the_topology_of_decentralized_runs(tmp_path: Path, backend: str, label: str) -> None:
    assert plot.read_run(write_run(tmp_path / "a", backend=backend)).label == label


def test_last_of_repeated_steps_counts_and_half_lines_do_not(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", steps=(0, 10, 20))
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as metrics:
        metrics.write(evaluation(10, val_loss=5.0) + evaluation(30)[:25])
    evaluations = plot.read_run(run).evaluations
    assert [e["step"] for e in evaluations] == [0, 10, 20]
    assert evaluations[1]["val_loss"] == 5.0


@pytest.mark.parametrize(("longest_s", "label"), [(59.0, "s"), (3000.0, "min"), (36862.0, "h")])
def test_unit_of_time_fits_the_longest_run(longest_s: float, label: str) -> None:
    runs = [plot.Run("", [{"total_train_time_s": t}]) for t in (1.0, longest_s)]
    assert plot._x_axis(runs, "time")[1] == f"Training time ({label})"


@pytest.mark.filterwarnings("error")
def test_single_evaluations_and_diverged_runs_are_drawn(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", steps=(0,))
    diverged = write_run(tmp_path / "diverged", steps=(0,))
    with open(diverged / "metrics.jsonl", "a", encoding="utf-8") as metrics:
        metrics.write(evaluation(10, val_loss=float("nan")))
    assert plot.main([str(one), str(diverged)]) == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", None, "no such file"),
        ("config.toml", None, "no such file"),
        ("metrics.jsonl", "", "holds no evaluation yet"),
        ("metrics.jsonl", "{\n" + evaluation(1), "line 1 is not an evaluation"),
        ("metrics.jsonl", '{"step": 1}\n', "line 1 is not an evaluation (KeyError: 'val_loss')"),
        (
            "metrics.jsonl",
            evaluation(1).replace("7.0", "null"),
            "line 1 is not an evaluation (TypeError: val_loss is null)",
        ),
        ("config.toml", "[train]\n", "not the configuration of a run"),
        ("config.toml", "[train", "not the configuration of a run"),
    ],
)
def test_invalid_input_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | None, message: str
) -> None:
    path = write_run(tmp_path / "a") / name
    path.unlink() if content is None else path.write_text(content, encoding="utf-8")
    assert plot.main([str(tmp_path / "a")]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"plot.py: {path}: {message}")
    assert stderr.count("\n") == 1


def test_unknown_image_format_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plot.main([str(write_run(tmp_path / "a")), "--out", str(tmp_path / "loss.xyz")]) == 2
    assert "xyz" in capsys.readouterr().err
