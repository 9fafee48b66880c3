"""The methods that `netlab.py compare` compares, and its options.

An arm of a comparison is a method to train with several workers. Its name is read like this:

    none               no communication, torch's fused AdamW: the step without communication
    pytorchddp         torch's DDP with its own buckets, fused AdamW; _4mb: buckets of 4 MB; _16bit: float16 gradients
    localsgd8          torch's PostLocalSGD: all workers average their parameters every 8 steps
    exp                DecentDP with this topology and AccumAdamW; or complete, ring, alternating-exp-ring
    exp_bf16_every8    exchanges bfloat16; an exchange every 8 steps
    exp_adamw          torch's fused AdamW instead of AccumAdamW; also none_accumadamw
    decent-dp_exp      the library decent-dp with its AccumAdamW; decent-dp_exp_adamw with torch's fused AdamW
"""

import argparse
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.lab.options import at_least, file_to_write, whole

TOPOLOGIES = ("complete", "ring", "exp", "alternating-exp-ring")
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
DEFAULT_STEPS, STRAGGLER_STEPS = 4, 96  # length of a block; the draws of stragglers must average out
DEFAULT_ROUNDS, STRAGGLER_ROUNDS = 3, 4  # even, for the draws of stragglers come in pairs (worker.slowness_of)


@dataclass(frozen=True)
class Method:
    name: str
    family: str  # "none", "pytorchddp", "localsgd", "decentdp" or "decent-dp"
    optimizer: str  # "adamw" or "accumadamw"
    topology: str | None = None  # in decentdp and decent-dp
    bf16: bool = False
    every: int = 1  # steps from one exchange to the next
    variant: str | None = None  # in pytorchddp: "4mb" or "16bit"


def parse_method(name: str) -> Method:
    """Return the method with this name, for argparse."""
    if match := re.fullmatch(r"none(_accumadamw)?", name):
        return Method(name, "none", "accumadamw" if match[1] else "adamw")
    if match := re.fullmatch(r"pytorchddp(?:_(4mb|16bit))?", name):
        return Method(name, "pytorchddp", "adamw", variant=match[1])
    if match := re.fullmatch(r"localsgd([1-9]\d?)", name):
        return Method(name, "localsgd", "adamw", every=int(match[1]))
    topology = "|".join(TOPOLOGIES)
    if match := re.fullmatch(rf"({topology})(_bf16)?(?:_every([1-9]\d?))?(_adamw)?", name):
        optimizer = "adamw" if match[4] else "accumadamw"
        return Method(name, "decentdp", optimizer, topology=match[1], bf16=bool(match[2]), every=int(match[3] or 1))
    if match := re.fullmatch(rf"decent-dp_({topology})(_adamw)?", name):
        return Method(name, "decent-dp", "adamw" if match[2] else "accumadamw", topology=match[1])
    raise argparse.ArgumentTypeError(f"no arm is called {name!r}; there are {', '.join(ALL_ARMS)}")


def parse_methods(text: str) -> list[Method]:
    """Return the methods in a list of names with commas, each once, in this order; or "default", or "all"."""
    names = {"all": ALL_ARMS, "default": DEFAULT_ARMS}.get(text) or text.split(",")
    return [parse_method(name) for name in dict.fromkeys(names)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, here = parser.add_argument, "(%(default)s in the current directory, replaced)"
    add("--arms", type=parse_methods, default="default", help='names with commas, or "all" (%(default)s)')
    add("--steps", type=whole(1), help="length of a block, rounded up to whole periods (4; stragglers: 96)")
    add("--rounds", type=whole(1), help="interleaved blocks of each arm (3; stragglers: 4)")
    add("--compute-ms", type=at_least(0), default=345, help="forward and backward (%(default)s)")
    add("--straggler", type=at_least(1), default=1, help="one random worker's slowness in each step")
    add("--n-layers", type=whole(1), default=8, help="layers of the GPT that is emulated (%(default)s)")
    add("--n-embd", type=whole(1), default=320, help="its width (%(default)s)")
    add("--json", type=file_to_write, default="netlab.json", metavar="FILE", help=f"all that was measured {here}")
    add("--png", type=_png_to_write, default="netlab.png", metavar="FILE", help=f"image of the step times {here}")


def _png_to_write(text: str) -> Path:
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text} does not end in .png")
    return file_to_write(text)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a comparison, which the workers and the results need, as JSON."""
    straggling = args.straggler > 1
    return {
        **{key: getattr(args, key) for key in ("nodes", "procs", "compute_ms", "straggler", "n_layers", "n_embd")},
        "arms": [asdict(arm) for arm in args.arms],
        "steps": args.steps or (STRAGGLER_STEPS if straggling else DEFAULT_STEPS),
        "rounds": args.rounds or (STRAGGLER_ROUNDS if straggling else DEFAULT_ROUNDS),
    }
