"""Makes train.bin, val.bin and meta.json of OpenWebText, of another data set of the Hugging Face hub, or of your text.

    python data/openwebtext/prepare.py --num-proc 16
    python data/openwebtext/prepare.py --input 'texts/*.txt' --out data/mine
    python data/openwebtext/prepare.py --hub HuggingFaceFW/fineweb --config sample-10BT --out data/fineweb

Does nothing when they are there already, and resumes where it was stopped. Without --input it needs the Hugging Face
hub, or .parquet files in its cache with HF_HUB_OFFLINE=1.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if TYPE_CHECKING:
    from data.documents import Corpus

HERE = Path(__file__).resolve().parent

# The parquet revision of the data set that nanoGPT loads as "openwebtext" (a script, which datasets 4 no longer runs).
OPENWEBTEXT = ("Skylion007/openwebtext", "plain_text", "79d93d786212f7344586290adb811d4ae6a1762c")
N_TOKENS = {"train": 9_035_582_489, "val": 4_434_606}
VAL_FRACTION = 0.0005  # nanoGPT's

ALTERNATIVES = (
    "use texts or parquet files that you have with --input; or run this script on a machine with a network and copy "
    "train.bin, val.bin and meta.json here; or set HF_ENDPOINT to a mirror of the hub; or set HF_HOME to a cache that "
    "holds the data set, with HF_HUB_OFFLINE=1; or train on the small corpus of data/sotu/prepare.py"
)


def main() -> int:
    """Return the exit code: 0, 2 after one line that says what is wrong, 130 after Ctrl-C."""
    args = parse_args()
    try:
        run(args)
    except KeyboardInterrupt:
        print("stopped; the same command resumes from here", file=sys.stderr)
        return 130
    except ValueError as error:
        message = str(error)
    except OSError as error:
        message = f"{os.fsdecode(error.filename or args.out)}: {error.strerror or error}"
    else:
        return 0
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        action="extend",
        nargs="+",
        metavar="FILES",
        help="files, folders or patterns: .txt (a document each), .jsonl, .jsonl.gz (a line), .parquet (a row)",
    )
    parser.add_argument("--hub", metavar="NAME", help="a data set of the Hugging Face hub (default: OpenWebText)")
    parser.add_argument("--config", help="its configuration")
    parser.add_argument("--revision", help="its commit, branch or tag")
    parser.add_argument("--out", help="folder of the three files (needed with --input and --hub; default: here)")
    parser.add_argument("--num-proc", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N documents only")
    parser.add_argument("--text-key", default="text", help="key or column of the text (default: %(default)s)")
    parser.add_argument("--skip-bad", action="store_true", help="count and skip documents that cannot be read")
    parser.add_argument(
        "--val-fraction",
        type=float,
        metavar="F",
        help="share of the documents to validate on (default: 0.0005 of OpenWebText; else as many as hold 20,000 "
        "tokens, at most a tenth)",
    )
    parser.add_argument(
        "--tokenizer",
        choices=["gigatoken", "tiktoken"],
        help="the same tokens, fast or slow (default: gigatoken where its tested version is installed)",
    )
    args = parser.parse_args()
    if (args.input or args.hub) and not args.out:
        parser.error("--input and --hub need --out, such as --out data/mine")
    if args.input and args.hub:
        parser.error("--input and --hub: give one of them")
    if (args.config or args.revision) and not args.hub:
        parser.error("--config and --revision need --hub")
    if args.num_proc < 1 or (args.limit is not None and args.limit < 1):
        parser.error("--num-proc and --limit: give a number above 0")
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        parser.error("--val-fraction: give a number between 0 and 1")
    args.out = args.out or str(HERE)
    return args


def run(args: argparse.Namespace) -> None:
    """Prepare what the arguments say, and print what the files hold.

    Raises:
        ValueError, OSError: in one line, what is wrong.
    """
    from data.files import printable, user_path
    from data.prepare import Job, holds_tokens, is_prepared, prepare
    from data.tokenizer import VERSIONS, gigatoken_is_tested

    out = Path(user_path(args.out, "--out"))
    there = printable(f"{out}: train.bin and val.bin are there already")
    is_openwebtext = not args.input and not args.hub
    if is_openwebtext and args.val_fraction is None:
        args.val_fraction = VAL_FRACTION
    is_whole = is_openwebtext and args.limit is None and args.val_fraction == VAL_FRACTION
    if is_whole and holds_tokens(out, N_TOKENS):
        print(there)
        return
    needed = " and ".join(f"{package} {version}" for package, version in VERSIONS.items())
    if args.tokenizer == "gigatoken" and not gigatoken_is_tested():
        raise ValueError(f"--tokenizer gigatoken: needs {needed}; or use --tokenizer tiktoken")
    job = Job(
        open_corpus(args),
        gigatoken=args.tokenizer != "tiktoken" and gigatoken_is_tested(),
        num_proc=args.num_proc,
        limit=args.limit,
        skip_bad=args.skip_bad,
        val_fraction=args.val_fraction,
    )
    if is_prepared(job, out):
        print(there)
        return
    if args.tokenizer is None and not job.gigatoken:
        print(f"tokenising with tiktoken; gigatoken is many times faster: install {needed}")
    meta = prepare(job, out)
    if meta.left_out:
        print(meta.left_out)
    for name, split in (("val", meta.val), ("train", meta.train)):
        numbers = f"{split.documents:,} documents, {split.tokens:,} tokens, SHA-256 {split.sha256}"
        print(printable(f"{out / name}.bin: {numbers}"))


def open_corpus(args: argparse.Namespace) -> "Corpus":
    from data.documents import hub_dataset, local_files
    from data.tokenizer import gpt2_encoding

    if args.input:
        return local_files(args.input, args.text_key)
    try:
        name, config, revision = (args.hub, args.config, args.revision) if args.hub else OPENWEBTEXT
        corpus = hub_dataset(name, config, revision, args.text_key)
    except ValueError as error:
        raise ValueError(f"{error}: {ALTERNATIVES}") from None
    gpt2_encoding()  # now: GPT-2's merges come from a network too
    return corpus


if __name__ == "__main__":
    sys.exit(main())
