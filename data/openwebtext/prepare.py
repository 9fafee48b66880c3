"""Makes train.bin, val.bin and meta.json of OpenWebText, or of your own text.

    python data/openwebtext/prepare.py --num-proc 16
    python data/openwebtext/prepare.py --input 'texts/*.txt' --out data/mine

Does nothing when they are there already, and goes on where it was stopped. Without --input it needs the Hugging Face
hub, or its cache with HF_HUB_OFFLINE=1.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if TYPE_CHECKING:
    from data.documents import Source

HERE = Path(__file__).resolve().parent

# The parquet revision of the data set that nanoGPT loads as "openwebtext" (a script, which datasets 4 no longer runs).
DATASET = "Skylion007/openwebtext"
CONFIG = "plain_text"
REVISION = "79d93d786212f7344586290adb811d4ae6a1762c"
N_FILES = 80
N_DOCUMENTS = 8_013_769  # in files of nearly equal numbers
N_TOKENS = {"train": 9_035_582_489, "val": 4_434_606}
ANSWER_S = 15  # of the hub; with twice _TIMEOUT_S of data/tokenizer.py below a minute

ALTERNATIVES = (
    "use texts or parquet files that you have with --input; or run this script on a machine with a network and copy "
    "train.bin, val.bin and meta.json here; or set HF_ENDPOINT to a mirror of the hub; or set HF_HOME to a cache that "
    "holds the data set, with HF_HUB_OFFLINE=1; or train on the small corpus of data/sotu/prepare.py"
)


def main() -> int:
    args = parse_args()
    try:
        return run(args)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except ValueError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or args.out}: {error.strerror or error}"
    from data.pipeline import SPOOL

    if any((args.out / SPOOL).glob("*/*")):
        message += f"; what is done is in {args.out / SPOOL}, for the next run"
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        action="append",
        metavar="FILES",
        help="a file or a quoted pattern: .txt (a document each), .jsonl, .jsonl.gz, .parquet; may be given repeatedly",
    )
    parser.add_argument("--out", type=Path, help="folder of the three files (needed with --input; default: here)")
    parser.add_argument("--num-proc", type=_positive, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument("--limit", type=_positive, metavar="N", help="take the first N documents only")
    parser.add_argument("--text-key", default="text", help="key or column of the text (default: %(default)s)")
    parser.add_argument("--skip-bad", action="store_true", help="count and leave out documents that cannot be read")
    parser.add_argument(
        "--tokenizer",
        choices=["gigatoken", "tiktoken"],
        help="the same tokens, fast or slow (default: gigatoken where its tested version is installed)",
    )
    args = parser.parse_args()
    if args.input and not args.out:
        parser.error("--input needs --out, such as --out data/mine")
    args.out = args.out or HERE
    return args


def run(args: argparse.Namespace) -> int:
    """Raises:
    ValueError, OSError: in one line, what is wrong.
    """
    from data.encoders import VERSIONS, best_encoder, build_encoder
    from data.pipeline import holds_tokens, is_prepared, prepare
    from data.tokenise import Job

    if not args.input and args.limit is None and holds_tokens(args.out, N_TOKENS):
        print(f"{args.out}: train.bin and val.bin are there already")
        return 0
    source = local_source(args.input, args.text_key) if args.input else openwebtext(args.num_proc, args.limit)
    if is_prepared(args.out, source, args.limit, skip_bad=args.skip_bad):
        print(f"{args.out}: train.bin and val.bin are there already")
        return 0
    encoder = build_encoder(args.tokenizer or best_encoder())
    if args.tokenizer is None and encoder.name == "tiktoken":
        needed = " ".join(f"{package}=={version}" for package, version in VERSIONS.items())
        print(f"tokenising with tiktoken; gigatoken is many times faster: pip install {needed}")
    job = Job(source, encoder, limit=args.limit, skip_bad=args.skip_bad)
    meta = prepare(job, args.out, num_proc=args.num_proc)
    if meta.left_out:
        print(meta.left_out)
    for name, split in (("val", meta.val), ("train", meta.train)):
        print(f"{args.out / name}.bin: {split.documents:,} documents, {split.tokens:,} tokens, SHA-256 {split.sha256}")
    return 0


def local_source(patterns: list[str], text_key: str) -> "Source":
    from data.documents import Source, find_files

    return Source(", ".join(patterns), find_files(patterns), text_key)


def openwebtext(num_proc: int, limit: int | None) -> "Source":
    """The parquet files of all documents, or as many of the first as hold `limit` of them, from the hub or its cache.

    Raises:
        ValueError: the hub is out of reach, or the files are not in the cache while HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants

    from data.documents import plan_units
    from data.tokenizer import gpt2_encoding

    if not constants.HF_HUB_OFFLINE:
        _ask(constants.ENDPOINT)  # the download would try for long
    gpt2_encoding()  # now: GPT-2's merges come from a network too
    wanted = limit or N_DOCUMENTS
    n_files = min(N_FILES, max(1, wanted * N_FILES // N_DOCUMENTS))
    source = _download(n_files, num_proc)
    while n_files < N_FILES and sum(unit.n_rows or 0 for unit in plan_units(source)) < wanted:
        n_files += 1
        source = _download(n_files, num_proc)
    return source


def _download(n_files: int, num_proc: int) -> "Source":
    """The first files, downloaded unless they are in the cache."""
    import huggingface_hub

    from data.documents import Source

    names = [f"{CONFIG}/train-{i:05}-of-{N_FILES:05}.parquet" for i in range(n_files)]
    try:
        folder = huggingface_hub.snapshot_download(
            DATASET,
            repo_type="dataset",
            revision=REVISION,
            allow_patterns=names,
            max_workers=num_proc,
        )
    except Exception as error:  # of the hub's client, its HTTP library, or the disk
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{DATASET} cannot be loaded ({reason}): {ALTERNATIVES}") from None
    files = tuple(str(path) for name in names if (path := Path(folder) / name).exists())
    if len(files) != n_files:
        raise ValueError(f"{folder}: has {len(files)} of {n_files} parquet files of {DATASET}: {ALTERNATIVES}")
    return Source(f"{DATASET} at {REVISION[:8]}", files)


def _ask(endpoint: str) -> None:
    """Any answer will do, an error of HTTP as well."""
    import http.client
    import urllib.error
    import urllib.request

    from data.network import answer_within

    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        answer_within(ANSWER_S, lambda: urllib.request.urlopen(request, timeout=ANSWER_S).close())
    except urllib.error.HTTPError as error:
        error.close()
    except (OSError, ValueError, http.client.HTTPException) as error:  # the latter two: it is no address, no hub
        reason = getattr(error, "reason", error)
        raise ValueError(f"{endpoint} cannot be reached ({reason}): {ALTERNATIVES}") from None


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number above 0")
    return number


if __name__ == "__main__":
    sys.exit(main())
