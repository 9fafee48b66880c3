"""The results of `netlab.py compare`: machine, statistics, table, image."""

import os
import platform
import re
import statistics
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scripts.lab.methods import parse_method

REFERENCES = ("pytorchddp", "pytorchddp_4mb")  # speed-ups are over the faster one


def describe_machine() -> dict[str, Any]:
    model = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    machine = {"cpu": model[1] if model else platform.machine(), "cores": len(os.sched_getaffinity(0))}
    return {"machine": machine, "versions": {"python": platform.python_version(), "torch": version("torch")}}


@dataclass(frozen=True)
class Result:
    arm: str
    step_ms: float  # median over the blocks
    best_ms: float  # of the fastest block
    exchange_ms: float | None  # per step, of the exchange alone; None means without an exchange
    speedup: float | None  # over the reference; None means that it was not measured
    hidden: float | None  # share of the exchange that overlaps with computation
    sent_bytes: float  # per step and node


def summarize(arms: list[dict[str, Any]]) -> list[Result]:
    """Return a result for each arm, from the raw numbers of the workers.

    A block's step time is the mean over the workers: the time that a straggler alone lost is not the others' loss.
    """
    blocks = {arm["name"]: [statistics.mean(block["ms"]) for block in arm["blocks"]] for arm in arms}
    median = {name: statistics.median(values) for name, values in blocks.items()}
    reference = min((median[name] for name in REFERENCES if name in median), default=None)
    results = []
    for arm in arms:
        name = arm["name"]
        alone = [statistics.mean(block["exchange_ms"]) for block in arm["blocks"] if None not in block["exchange_ms"]]
        exchange = statistics.median(alone) if alone else None
        result = Result(
            arm=name,
            step_ms=median[name],
            best_ms=min(blocks[name]),
            exchange_ms=exchange,
            speedup=reference / median[name] if reference else None,
            hidden=hidden_share(median[name], median.get("none"), exchange),
            sent_bytes=statistics.mean(node for block in arm["blocks"] for node in block["sent_bytes"]),
        )
        results.append(result)
    return results


def hidden_share(step_ms: float, none_ms: float | None, exchange_ms: float | None) -> float | None:
    """Return 1 - (step - step without communication) / exchange alone, in [0, 1]. None means nothing to compare."""
    if none_ms is None or not exchange_ms:
        return None
    return min(1.0, max(0.0, 1 - (step_ms - none_ms) / exchange_ms))


def table(scenario: dict[str, Any], settings: dict[str, Any]) -> str:
    """Return the table as Markdown, without the hidden shares if workers also wait for stragglers."""
    straggling = settings["straggler"] > 1
    rows: list[tuple[str, ...]] = [
        ("arm", "ms/step (best)", "x DDP", "exchange alone, ms", "hidden", "MB sent/step/node")
    ]
    for result in summarize(scenario["arms"]):
        rows.append(
            (
                result.arm,
                f"{result.step_ms:.0f} ({result.best_ms:.0f})",
                "" if result.speedup is None else f"{result.speedup:.2f}",
                "" if result.exchange_ms is None else f"{result.exchange_ms:.0f}",
                "" if result.hidden is None or straggling else f"{result.hidden:.0%}",
                f"{result.sent_bytes / 1e6:.1f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows.insert(1, tuple("-" * (width - 1) + ":" for width in widths))
    lines = [f"| {' | '.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))} |" for row in rows]
    title = f"{scenario['bandwidth']}: {describe(scenario, settings)}"
    return "\n".join(["", title, "", *lines, "", *reasons(scenario)])


def reasons(scenario: dict[str, Any]) -> list[str]:
    """Return the reason for each skipped arm, one line each."""
    return [f"{arm['name']}: {arm['skipped']}" for arm in scenario["skipped"]]


def describe(scenario: dict[str, Any], settings: dict[str, Any]) -> str:
    """Return the measured setting in one line, without the bandwidth."""
    straggler = f", one random worker {settings['straggler']:g}x slower each step" if settings["straggler"] > 1 else ""
    millions = scenario["parameters"] / 1e6
    return (
        f"{settings['nodes']} nodes x {settings['procs']}, {millions:.1f}M parameters ({4 * millions:.1f} MB), "
        f"computation {settings['compute_ms']:.0f} ms (emulated){straggler}"
    )


COLOURS = {
    "none": "0.75",
    "pytorchddp": "#c44e52",
    "localsgd": "#dd8452",
    "decentdp": "#2f6db0",
    "decent-dp": "#7f6ba8",
}


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the image: one panel for each bandwidth, a bar for the step time of each arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scenarios, machine = report["scenarios"], report["machine"]
    height = 1.9 + 0.3 * max(len(scenario["arms"]) for scenario in scenarios)
    size = (2.4 + 4.4 * len(scenarios), height)
    fig, axes = plt.subplots(1, len(scenarios), figsize=size, layout="constrained", squeeze=False)
    for ax, scenario in zip(axes[0], scenarios, strict=True):
        _draw_scenario(ax, scenario)
    fig.suptitle(describe(scenarios[0], report["settings"]), x=0.01, ha="left", fontsize=10, fontweight="bold")
    source = f"{machine['cores']} cores of {machine['cpu']}, torch {report['versions']['torch']}"
    fig.supxlabel(source, x=0.01, ha="left", fontsize=8, color="0.4")
    fig.savefig(path, dpi=150)
    plt.close(fig)


def _draw_scenario(ax: Any, scenario: dict[str, Any]) -> None:
    results = summarize(scenario["arms"])
    colours = [COLOURS[parse_method(result.arm).family] for result in results]
    bars = ax.barh([result.arm for result in results], [result.step_ms for result in results], color=colours)
    speedups = ["" if result.speedup is None else f"  {result.speedup:.2f}x" for result in results]
    labels = [f"{result.step_ms:,.0f}{speedup}" for result, speedup in zip(results, speedups, strict=True)]
    ax.bar_label(bars, labels, padding=4, fontsize=8)
    for result in results:
        if result.arm == "none":
            ax.axvline(result.step_ms, color="0.35", linewidth=0.9, linestyle="--")
    ax.invert_yaxis()
    ax.set_xlim(0, 1.28 * max(result.step_ms for result in results))
    ax.set_title(scenario["bandwidth"], loc="left")
    ax.set_xlabel("ms per step; speed-up over pytorchddp")
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
