"""Measures the parts that decide the speed of decentralized training, as ratios to what one would use otherwise.

    python scripts/bench.py optimizer --threads 1     # AccumAdamW against torch's AdamW and decent-dp's AccumAdamW
    python scripts/bench.py wrapper                   # a training step in DecentDP against the bare model, one process
    python scripts/bench.py checkpoint                # how long a save holds training up
    python scripts/bench.py exchange --workers 2      # one exchange against an all-reduce, and how much is hidden
    python scripts/bench.py loader                    # batches against nanoGPT's, waiting for them, memory of a corpus
    python scripts/bench.py prepare                   # the preparation of a corpus against nanoGPT's

Short blocks of the arms are interleaved. A ratio is the median over rounds of the ratio within a round, so that a
machine that others use too slows both sides alike. Times still differ from machine to machine: compare ratios.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmarks import checkpoint, exchange, loader, optimizer, prepare, wrapper
from scripts.benchmarks.timing import print_table
from scripts.lab.options import InputError, file_to_write, whole

BENCHMARKS = {
    "optimizer": (optimizer, "steps of a GPT's parameters, no gradients"),
    "wrapper": (wrapper, "a world of one worker"),
    "checkpoint": (checkpoint, "a world of one worker"),
    "exchange": (exchange, "gloo workers on this machine"),
    "loader": (loader, "batches, the wait for them, memory of the corpus"),
    "prepare": (prepare, "a corpus, in processes of their own"),
}


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0; 1 if a measurement failed; 2 for a mistake in the input, after one line."""
    args = parse_args(argv)
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # torch reads it when it is imported, workers too
    try:
        results = args.measure(args)
        print_table(results)
        if args.json:
            answer = {"arguments": describe(args), "results": results}
            args.json.write_text(json.dumps(answer, indent=2, default=str) + "\n")
    except (InputError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--rounds", type=whole(1), default=20, help="blocks of each arm (default: %(default)s)")
    common.add_argument("--threads", type=whole(1, 1000), help="threads of each process; default: as torch chooses")
    common.add_argument("--json", type=file_to_write, metavar="FILE", help="also write the results here")
    commands = parser.add_subparsers(required=True, metavar="|".join(BENCHMARKS))
    for name, (module, summary) in BENCHMARKS.items():
        command = commands.add_parser(name, parents=[common], help=summary, description=module.__doc__)
        command.set_defaults(benchmark=name, measure=module.measure)
        module.add_arguments(command)
    return parser.parse_args(argv)


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options and the version of torch, for the JSON file."""
    import torch

    given = {name: value for name, value in vars(args).items() if name not in ("measure", "json")}
    return {"benchmark": args.benchmark, **given, "torch": torch.__version__}


if __name__ == "__main__":
    sys.exit(main())
