"""bench.py prepare: nanoGPT's preparation of a corpus against ours, on the same text, to the same bytes.

Each run is a fresh process with fresh caches of the data sets; the text itself is in the page cache for all. Memory is
measured in a run of its own: the sum over all its processes of the proportional set size, in which a shared page counts
once. The last two arms are bounds: the calls of a tokenizer alone, with the documents in memory and no output.
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from scripts.benchmarks.timing import Result, median_ratio, print_table, pss_bytes
from scripts.lab.options import MAX_PROCESSES, InputError, at_least, whole

ROOT = Path(__file__).resolve().parents[2]
PREPARE = str(ROOT / "data/openwebtext/prepare.py")
NANOGPT = "nanoGPT"
TOKENIZERS = ("tiktoken", "gigatoken")
N_FILES = 8  # so that several processes have work of their own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        type=_text_file,
        help="a .jsonl or .parquet file with a column text; default: built from the addresses of data/sotu and the "
        "sources and documentation of Python's packages on this machine",
    )
    parser.add_argument(
        "--megabytes",
        type=at_least(0.001),
        default=250.0,
        help=f"size of the text that is built, in {N_FILES} files (default: %(default)s)",
    )
    parser.add_argument(
        "--document-bytes",
        type=whole(1),
        default=1400,
        help="approximate size of its documents: longer texts are cut between lines (default: %(default)s; nanoGPT's "
        "time goes by documents as well, ours by bytes; OpenWebText's have 5000)",
    )
    parser.add_argument(
        "--num-proc", type=whole(1, MAX_PROCESSES), default=2, help="processes of our arms; nanoGPT's has 2"
    )
    parser.set_defaults(rounds=3)


def _text_file(text: str) -> Path:
    if not text.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        raise argparse.ArgumentTypeError(f"{text} does not end in .jsonl or .parquet")
    return Path(text)


def measure(args: argparse.Namespace) -> list[Result]:
    """Return seconds, ratio to nanoGPT's, peak memory and hashes of the outputs.

    Raises:
        InputError: the text cannot be prepared, or this machine has too little.
        SystemExit: the outputs differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        if args.input:
            texts = [str(args.input)]
        else:
            texts = write_corpus(Path(folder), n_bytes=round(args.megabytes * 1e6), document_bytes=args.document_bytes)
        commands = {NANOGPT: ["-m", "scripts.benchmarks.nanogpt", *texts]}
        for tokenizer in TOKENIZERS:
            options = [f"--num-proc={args.num_proc}", f"--tokenizer={tokenizer}", "--val-fraction=0.0005"]
            commands[f"ours, {tokenizer}"] = [PREPARE, *(f"--input={text}" for text in texts), *options]
        # Ours first, for it says what is wrong with a text.
        peaks_bytes = {arm: run(commands[arm], measure_memory=True)[1] for arm in reversed(commands)}
        print(f"{args.input or 'the text'}: {sum(os.path.getsize(text) for text in texts) / 1e6:.1f} MB")
        documents = [document for text in texts for document in read_documents(text)]
        times_s: dict[str, list[float]] = {}
        hashes: dict[str, str] = {}
        for _ in range(args.rounds):
            for arm, command in commands.items():
                seconds, _, hashes[arm] = run(command)
                times_s.setdefault(arm, []).append(seconds)
            for tokenizer in TOKENIZERS:
                times_s.setdefault(f"{tokenizer}'s calls", []).append(calls_s(tokenizer, documents, args.num_proc))
    rows: list[Result] = [
        {
            "arm": arm,
            "median s": round(statistics.median(times), 3),
            "fastest s": round(min(times), 3),
            "times as fast": round(median_ratio(times_s[NANOGPT], times), 2),
        }
        for arm, times in times_s.items()
    ]
    for row in rows[: len(commands)]:  # the others are bounds
        arm = str(row["arm"])
        row |= {"peak MB": round(peaks_bytes[arm] / 1e6), "SHA-256 of train.bin, val.bin": hashes[arm]}
    if len(set(hashes.values())) > 1:
        print_table(rows)
        raise SystemExit("error: the outputs differ")
    return rows


def run(command: list[str], *, measure_memory: bool = False) -> tuple[float, int, str]:
    """Return the seconds of a preparation, its peak bytes (0: not measured) and the hashes of its two files.

    command: arguments of Python, to which `--out FOLDER` is added.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        environment = os.environ | {"HF_HOME": folder, "HF_DATASETS_CACHE": f"{folder}/datasets", "HF_HUB_OFFLINE": "1"}
        with open(Path(folder) / "log", "w+") as log:
            start_s = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, *command, "--out", str(out)],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )
            peak_bytes = peak_of_session(process) if measure_memory else 0
            code = process.wait()
            seconds = time.perf_counter() - start_s
            log.seek(0)
            said = log.read()
        if code == 2:
            raise InputError(said.splitlines()[-1].removeprefix("error: "))
        if code:
            raise SystemExit(f"error: {' '.join(command)} ended with {code}:\n{said[-2000:]}")
        digests = [hashlib.sha256((out / f"{split}.bin").read_bytes()).hexdigest() for split in ("train", "val")]
        return seconds, peak_bytes, " ".join(digests)


def peak_of_session(process: subprocess.Popen[bytes]) -> int:
    """Return the most memory that the processes of a session have together until its first one ends."""
    peak_bytes = 0
    while process.poll() is None:
        peak_bytes = max(peak_bytes, sum(map(pss_bytes, pids_of_session(process.pid))))
        time.sleep(0.01)
    return peak_bytes


def pids_of_session(session: int) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # the process has ended meanwhile
            continue
        if int(fields[3]) == session:
            yield int(folder.name)


def read_documents(text: str) -> list[str]:
    if text.endswith(".parquet"):
        import pyarrow.parquet

        return pyarrow.parquet.read_table(text, columns=["text"])["text"].to_pylist()
    with (gzip.open if text.endswith(".gz") else open)(text, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def calls_s(tokenizer: str, documents: list[str], num_proc: int) -> float:
    """Return the seconds in which n processes encode all documents."""
    from data.tokenizer import encode_with_tiktoken, gigatoken_encoder

    encode = gigatoken_encoder() if tokenizer == "gigatoken" else encode_with_tiktoken

    def encode_share(first: int) -> None:
        for document in documents[first::num_proc]:
            encode(document)

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=encode_share, args=(first,)) for first in range(num_proc)]
    start_s = time.perf_counter()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"error: a process that calls {tokenizer} ended with {process.exitcode}")
    return time.perf_counter() - start_s


def write_corpus(folder: Path, *, n_bytes: int, document_bytes: int) -> list[str]:
    """Write n_bytes of text, but at least two documents, to N_FILES .jsonl files. No document occurs twice.

    Raises:
        InputError: this machine has less text.
    """
    seen: set[bytes] = set()
    n_written = 0
    paths = [folder / f"{i}.jsonl" for i in range(N_FILES)]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(path, "w")) for path in paths]
        for document in (part for text in _texts() for part in _cut(text, document_bytes)):
            data = document.encode("utf-8")
            digest = hashlib.sha256(data).digest()
            if digest in seen:
                continue
            files[len(seen) % N_FILES].write(json.dumps({"text": document}) + "\n")
            seen.add(digest)
            n_written += len(data)
            if n_written >= n_bytes and len(seen) > 1:  # one for each split
                return [str(path) for path in paths[: len(seen)]]
    raise InputError(
        f"--megabytes {n_bytes / 1e6:g}: this machine has {n_written / 1e6:.0f}: ask for less, or give --input"
    )


def _texts() -> Iterator[str]:
    from data.sotu.prepare import read_addresses

    for texts in read_addresses().values():
        yield from texts
    for place in ("purelib", "stdlib"):
        for path in sorted(Path(sysconfig.get_path(place)).rglob("*")):
            if path.suffix in (".py", ".md", ".rst", ".txt") and path.is_file():
                try:
                    yield path.read_text("utf-8")
                except UnicodeDecodeError:
                    continue


def _cut(text: str, n: int) -> Iterator[str]:
    """Yield parts of about n characters, cut between lines."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + n) + 1 or len(text)
        yield text[start:end]
        start = end
