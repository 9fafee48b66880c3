"""What `netlab.py compare` compares, and what it makes of the measurements: statistics, table, image.

An arm is one way to train with several workers. Its name is read like this:

    none               no communication, torch's fused AdamW: the step without communication
    pytorchddp         torch's DDP with its own buckets, fused AdamW; _4mb: buckets of 4 MB; _16bit: float16 gradients
    localsgd8          torch's PostLocalSGD: all workers average their parameters every 8 steps
    exp                DecentDP with this topology and AccumAdamW; or complete, ring, alternating-exp-ring
    exp_bf16_every8    exchanges bfloat16; an exchange every 8 steps
    exp_adamw          torch's fused AdamW instead of AccumAdamW; also none_accumadamw
    decent-dp_exp      the library decent-dp with its AccumAdamW; decent-dp_exp_adamw with torch's fused AdamW
"""

import argparse
import importlib.metadata
import os
import platform
import re
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.arguments import at_least, file_to_write, whole

TOPOLOGIES = ("complete", "ring", "exp", "alternating-exp-ring")
REFERENCES = ("pytorchddp", "pytorchddp_4mb")  # the faster one counts
DECENTDP_ARMS = (*TOPOLOGIES, *(f"{t}_bf16" for t in TOPOLOGIES[1:]), "exp_bf16_every8")  # complete sends no bfloat16
DEFAULT_ARMS = (
    *("none", "pytorchddp", "pytorchddp_4mb", "pytorchddp_16bit", "localsgd8"),
    *DECENTDP_ARMS,
    *("exp_adamw", "decent-dp_exp", "decent-dp_exp_adamw"),  # like against like
)
ALL_ARMS = (
    *("none", "none_accumadamw", "pytorchddp", "pytorchddp_4mb", "pytorchddp_16bit", "localsgd8"),
    *(f"{arm}{adamw}" for arm in DECENTDP_ARMS for adamw in ("", "_adamw")),
    *(f"decent-dp_{t}{adamw}" for t in TOPOLOGIES[1:] for adamw in ("", "_adamw")),
)
FORWARD_SHARE = 1 / 3  # of the computation of a step; a backward costs two forwards
DEFAULT_STEPS, STRAGGLER_STEPS = 4, 96  # of a block: with stragglers the draws must average out
DEFAULT_ROUNDS, STRAGGLER_ROUNDS = 3, 4  # which come in pairs (netlab_worker.slowness_of)


@dataclass(frozen=True)
class Arm:
    name: str
    family: str  # "none", "pytorchddp", "localsgd", "decentdp" or "decent-dp"
    optimizer: str  # "adamw" or "accumadamw"
    topology: str | None = None  # of decentdp and decent-dp
    bf16: bool = False
    every: int = 1  # steps from one exchange to the next
    variant: str | None = None  # of pytorchddp: "4mb" or "16bit"


def parse_arm(name: str) -> Arm:
    """
    Raises:
        argparse.ArgumentTypeError: no arm has this name.
    """
    if match := re.fullmatch(r"none(_accumadamw)?", name):
        return Arm(name, "none", "accumadamw" if match[1] else "adamw")
    if match := re.fullmatch(r"pytorchddp(?:_(4mb|16bit))?", name):
        return Arm(name, "pytorchddp", "adamw", variant=match[1])
    if match := re.fullmatch(r"localsgd([1-9]\d?)", name):
        return Arm(name, "localsgd", "adamw", every=int(match[1]))
    topology = "|".join(TOPOLOGIES)
    if match := re.fullmatch(rf"({topology})(_bf16)?(?:_every([1-9]\d?))?(_adamw)?", name):
        optimizer = "adamw" if match[4] else "accumadamw"
        return Arm(name, "decentdp", optimizer, topology=match[1], bf16=bool(match[2]), every=int(match[3] or 1))
    if match := re.fullmatch(rf"decent-dp_({topology})(_adamw)?", name):
        return Arm(name, "decent-dp", "adamw" if match[2] else "accumadamw", topology=match[1])
    raise argparse.ArgumentTypeError(f"no arm is called {name!r}; there are {', '.join(ALL_ARMS)}")


def parse_arms(text: str) -> list[Arm]:
    """Names with commas, "default" or "all"; each arm once, in this order."""
    names = {"all": ALL_ARMS, "default": DEFAULT_ARMS}.get(text) or text.split(",")
    return [parse_arm(name) for name in dict.fromkeys(names)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arms", type=parse_arms, default="default", help='names with commas, or "all" (%(default)s)')
    parser.add_argument("--steps", type=whole(1), help="of a block, rounded up to whole periods (4; stragglers: 96)")
    parser.add_argument("--rounds", type=whole(1), help="blocks of each arm, by turns (3; stragglers: 4)")
    parser.add_argument("--compute-ms", type=at_least(0), default=345, help="forward and backward (%(default)s)")
    parser.add_argument("--straggler", type=at_least(1), default=1, help="one random worker's slowness in each step")
    parser.add_argument("--n-layers", type=whole(1), default=8, help="of the GPT that is emulated (%(default)s)")
    parser.add_argument("--n-embd", type=whole(1), default=320, help="its width (%(default)s)")
    here = "(%(default)s in the current directory, replaced)"
    parser.add_argument(
        "--json", type=file_to_write, default="netlab.json", metavar="FILE", help=f"all that was measured {here}"
    )
    parser.add_argument(
        "--png", type=_png_to_write, default="netlab.png", metavar="FILE", help=f"image of the step times {here}"
    )


def _png_to_write(text: str) -> Path:
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text} does not end in .png")
    return file_to_write(text)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the workers must know, as JSON."""
    straggling = args.straggler > 1
    return {
        "nodes": args.nodes,
        "procs": args.procs,
        "arms": [asdict(arm) for arm in args.arms],
        "steps": args.steps or (STRAGGLER_STEPS if straggling else DEFAULT_STEPS),
        "rounds": args.rounds or (STRAGGLER_ROUNDS if straggling else DEFAULT_ROUNDS),
        "forward_ms": args.compute_ms * FORWARD_SHARE,
        "backward_ms": args.compute_ms * (1 - FORWARD_SHARE),
        "straggler": args.straggler,
        "n_layers": args.n_layers,
        "n_embd": args.n_embd,
    }


def describe_machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = re.search(r"^model name\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    versions: dict[str, str | None] = {"python": platform.python_version(), "linux": platform.release()}
    for package in ("torch", "numpy", "decent-dp"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    cores = len(os.sched_getaffinity(0))
    return {"machine": {"cpu": model[1] if model else platform.machine(), "cores": cores}, "versions": versions}


@dataclass(frozen=True)
class Result:
    arm: str
    step_ms: float  # median over the blocks
    best_ms: float  # of the fastest block
    exchange_ms: float | None  # per step, of the exchange alone; None: it has none
    speedup: float | None  # over the reference; None: it was not measured
    hidden: float | None  # share of the exchange
    sent_bytes: float  # per step and node


def summarize(arms: list[dict[str, Any]]) -> list[Result]:
    """Pure: from the raw numbers of the workers, one for each arm that could be measured.

    A block's step time is the mean over the workers: what a straggler alone lost is not the others' loss.
    """
    blocks = {arm["name"]: [statistics.mean(block["ms"]) for block in arm["blocks"]] for arm in arms}
    median = {name: statistics.median(values) for name, values in blocks.items()}
    reference = min((median[name] for name in REFERENCES if name in median), default=None)
    results = []
    for arm in arms:
        name = arm["name"]
        alone = [statistics.mean(block["exchange_ms"]) for block in arm["blocks"] if block["exchange_ms"] is not None]
        exchange = statistics.median(alone) if alone else None
        sent = [node for block in arm["blocks"] for node in block["sent_bytes"]]
        results.append(
            Result(
                arm=name,
                step_ms=median[name],
                best_ms=min(blocks[name]),
                exchange_ms=exchange,
                speedup=reference / median[name] if reference else None,
                hidden=hidden_share(median[name], median.get("none"), exchange),
                sent_bytes=statistics.mean(sent),
            )
        )
    return results


def hidden_share(step_ms: float, none_ms: float | None, exchange_ms: float | None) -> float | None:
    """1 - (step - step without communication) / exchange alone, in [0, 1]; None where there is nothing to compare."""
    if none_ms is None or not exchange_ms:
        return None
    return min(1.0, max(0.0, 1 - (step_ms - none_ms) / exchange_ms))


def table(scenario: dict[str, Any], settings: dict[str, Any]) -> str:
    """Text that is Markdown too; without the hidden shares when workers also wait for stragglers."""
    straggling = settings["straggler"] > 1
    rows = [("arm", "ms/step (best)", "x DDP", "exchange alone, ms", "hidden", "MB sent/step/node")]
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
    lines = [_row(row, widths) for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + (":" if i else "-") for i, width in enumerate(widths)) + "|")
    title = f"{scenario['bandwidth']}: {describe(scenario, settings)}"
    return "\n".join(["", title, "", *lines, "", *reasons(scenario)])


def _row(cells: tuple[str, ...], widths: list[int]) -> str:
    padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
    return "| " + " | ".join([cells[0].ljust(widths[0]), *padded[1:]]) + " |"


def reasons(scenario: dict[str, Any]) -> list[str]:
    """Why arms were skipped, a line for each."""
    return [f"{arm['name']}: {arm['skipped']}" for arm in scenario["skipped"]]


def describe(scenario: dict[str, Any], settings: dict[str, Any]) -> str:
    """What was measured, in one line without the bandwidth."""
    compute_ms = settings["forward_ms"] + settings["backward_ms"]
    straggler = f", one random worker {settings['straggler']:g}x slower each step" if settings["straggler"] > 1 else ""
    millions = scenario["parameters"] / 1e6
    return (
        f"{settings['nodes']} nodes x {settings['procs']}, {millions:.1f}M parameters ({4 * millions:.1f} MB), "
        f"computation {compute_ms:.0f} ms (emulated){straggler}"
    )


COLOURS = {  # by family; the second for 16-bit values
    "none": ("0.75", "0.75"),
    "pytorchddp": ("#c44e52", "#e39a9c"),
    "localsgd": ("#dd8452", "#dd8452"),
    "decentdp": ("#2f6db0", "#83b2de"),
    "decent-dp": ("#7f6ba8", "#7f6ba8"),
}


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes the image: one panel for each bandwidth, a bar for the step time of each arm."""
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
    arms = [parse_arm(result.arm) for result in results]
    colours = [COLOURS[arm.family][arm.bf16 or arm.variant == "16bit"] for arm in arms]
    ax.barh([arm.name for arm in arms], [result.step_ms for result in results], color=colours, height=0.72)
    for i, result in enumerate(results):
        speedup = "" if result.speedup is None else f"  {result.speedup:.2f}x"
        ax.annotate(
            f"{result.step_ms:,.0f}{speedup}",
            (result.step_ms, i),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    none = next((result.step_ms for result in results if result.arm == "none"), None)
    if none is not None:
        ax.axvline(none, color="0.35", linewidth=0.9, linestyle="--")
    ax.invert_yaxis()
    ax.set_xlim(0, 1.28 * max(result.step_ms for result in results))
    ax.set_title(scenario["bandwidth"], loc="left")
    ax.set_xlabel("ms per step; speed-up over pytorchddp")
    ax.tick_params(axis="y", length=0)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right", "left"]].set_visible(False)
