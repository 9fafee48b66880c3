"""Draws the validation and training loss of one or more runs.

python scripts/plot.py log/<run> log/<other> --x time --out loss.png
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KEYS = ("val_loss", "train_loss", "total_train_time_s")  # of an evaluation, besides its step


@dataclass(frozen=True)
class Run:
    label: str
    evaluations: list[dict[str, Any]]  # objects of metrics.jsonl by increasing step, at least one


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, or 2 after one line on stderr that says what is wrong."""
    args = parse_args(argv)
    out = Path(args.out or Path(args.runs[0]) / "loss.png")
    try:
        draw([read_run(Path(run)) for run in args.runs], args.x, out)
    except (ValueError, OSError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run directories, with metrics.jsonl and config.toml")
    parser.add_argument("--out", help="image to write, format by its ending; default: loss.png in the first run")
    parser.add_argument("--x", choices=["step", "time"], default="step", help="time: training only (%(default)s)")
    return parser.parse_args(argv)


def read_run(directory: Path) -> Run:
    """Return the label and the losses of a run directory.

    Raises:
        ValueError: a file is missing, broken or empty.
    """
    metrics, config = directory / "metrics.jsonl", directory / "config.toml"
    for path in (metrics, config):
        if not path.is_file():
            raise ValueError(f"{path}: no such file; is {directory} a run directory?")
    return Run(f"{directory.resolve().name}: {_read_arm(config)}", _read_evaluations(metrics))


def _read_arm(path: Path) -> str:
    """Return backend, topology and optimizer, as in "decentdp, exp, accumadamw"."""
    import tomli

    try:
        train = tomli.loads(path.read_text(encoding="utf-8"))["train"]
        topology = [train["topology"]] if train["backend"] == "decentdp" else []
        return ", ".join([train["backend"], *topology, train["optim"]["name"]])
    except (tomli.TOMLDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the configuration of a run ({type(error).__name__}: {error})") from None


def _read_evaluations(path: Path) -> list[dict[str, Any]]:
    by_step: dict[int, dict[str, Any]] = {}  # a resumed run may repeat steps: the last counts
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            evaluation = json.loads(line)
            values = {key: evaluation[key] for key in ("step", *_KEYS)}
            for key, value in values.items():
                if not isinstance(value, int | float):
                    raise TypeError(f"{key} is {json.dumps(value):.40}")
            by_step[values["step"]] = values
        except (json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break  # half a line: the run is writing it, or was stopped while it wrote
            raise ValueError(f"{path}: line {number} is not an evaluation ({type(error).__name__}: {error})") from None
    if not by_step:
        raise ValueError(f"{path}: holds no evaluation yet")
    return [by_step[step] for step in sorted(by_step)]


def draw(runs: list[Run], x: str, out: Path) -> None:
    """Write the image: a colour per run, the validation loss solid and the training loss dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    fig, ax = plt.subplots(figsize=(9, 5.5), layout="constrained")
    key, unit, divisor = _x_axis(runs, x)
    ends: list[tuple[float, str]] = []  # last validation loss, colour
    shown: list[float] = []
    for i, run in enumerate(runs):
        colour = f"C{i % 10}"
        xs = [evaluation[key] / divisor for evaluation in run.evaluations]
        val_loss = [evaluation["val_loss"] for evaluation in run.evaluations]
        train_loss = [evaluation["train_loss"] for evaluation in run.evaluations]
        marker = "o" if len(xs) < 30 else None
        ax.plot(xs, train_loss, color=colour, linestyle="--", linewidth=1.2, alpha=0.6)
        ax.plot(xs, val_loss, color=colour, linewidth=1.8, marker=marker, markersize=3.5, label=run.label)
        ends.append((val_loss[-1], colour))
        start = len(xs) // 20  # the fall from ln(V) would flatten all that follows
        shown += val_loss[start:] + train_loss[start:]
    styles = [
        Line2D([], [], color="0.3", linewidth=1.8, label="validation"),
        Line2D([], [], color="0.3", linewidth=1.2, linestyle="--", alpha=0.6, label="training"),
    ]
    ax.set_ylim(*_with_margin(shown))
    ax.xaxis.set_major_formatter("{x:,.0f}" if x == "step" else "{x:g}")
    ax.set_title("GPT-2: validation and training loss", loc="left", fontweight="bold")
    ax.set_xlabel(unit)
    ax.set_ylabel("Cross entropy (nats per token)")
    ax.legend(handles=[*ax.get_legend_handles_labels()[0], *styles], frameon=False)
    ax.grid(True, color="0.9", linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)
    _annotate(ax, ends)
    fig.savefig(out, dpi=150)
    plt.close(fig)


def _x_axis(runs: list[Run], x: str) -> tuple[str, str, float]:
    """Return the key of the evaluations, the label of the axis, and the divisor of the values."""
    if x == "step":
        return "step", "Step", 1
    longest = max(run.evaluations[-1]["total_train_time_s"] for run in runs)
    if longest < 600:
        return "total_train_time_s", "Training time (s)", 1
    if longest < 7200:
        return "total_train_time_s", "Training time (min)", 60
    return "total_train_time_s", "Training time (h)", 3600


def _with_margin(values: list[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    margin = 0.05 * (max(finite) - min(finite)) or 0.1
    return min(finite) - margin, max(finite) + margin


def _annotate(ax: "Axes", ends: list[tuple[float, str]]) -> None:
    """Write the last value of every line right of the plot at its height, moved up where it would cover another."""
    below = -math.inf  # points
    for loss, colour in sorted(end for end in ends if math.isfinite(end[0])):
        height = ax.transData.transform((0, loss))[1] * 72 / ax.figure.dpi
        shift = max(0.0, below + 11 - height)
        below = height + shift
        ax.annotate(
            f"{loss:.3f}",
            xy=(1, loss),
            xycoords=ax.get_yaxis_transform(),
            xytext=(4, shift),
            textcoords="offset points",
            color=colour,
            fontsize=9,
            va="center",
            annotation_clip=False,
        )


if __name__ == "__main__":
    sys.exit(main())
