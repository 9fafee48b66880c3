"""bench.py prepare: nanoGPT's preparation of a corpus against ours, on the same text, to the same bytes.

Each run is a fresh process with fresh caches of the data sets; the text itself is in the page cache for all. Memory is
measured in a run of its own, as the sum over all its processes of the proportional set size, where what several share
counts once. The last two arms are bounds: the calls of a tokenizer alone, with the documents in memory and no output.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from data.documents import Bad, Source, UnitReader, plan_units
from data.encoders import EncoderName, build_encoder
from data.meta import file_sha256
from data.workers import run_in_processes
from scripts.arguments import MAX_PROCESSES, InputError, at_least, whole
from scripts.bench_timing import Result, print_table, pss_bytes

ROOT = Path(__file__).resolve().parents[1]
NANOGPT = "nanoGPT"
TOKENIZERS: tuple[EncoderName, ...] = ("tiktoken", "gigatoken")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        type=Path,
        help="a .jsonl or .parquet file with a column text; default: built from the addresses of data/sotu and the "
        "sources and documentation of Python's packages on this machine",
    )
    parser.add_argument("--megabytes", type=at_least(0.001), default=250.0, help="of text, when it is built")
    parser.add_argument(
        "--document-bytes",
        type=whole(1),
        default=1400,
        help="of text, about, when it is built: longer texts are cut between lines (default: %(default)s; nanoGPT's "
        "time goes by documents as well, ours by bytes; OpenWebText's have 5000)",
    )
    parser.add_argument("--num-proc", type=whole(1, MAX_PROCESSES), default=2, help="of our arms; nanoGPT's has 2")
    parser.set_defaults(command=bench_prepare, rounds=3)


def bench_prepare(args: argparse.Namespace) -> list[Result]:
    """Seconds, ratio to nanoGPT's, peak memory and hashes of the outputs.

    Raises:
        InputError: require_documents rejects the text, or this machine has too little.
        SystemExit: the outputs differ.
    """
    if args.input:
        require_documents(args.input)
    with tempfile.TemporaryDirectory() as folder:
        text = args.input or build_corpus(
            Path(folder) / "text.jsonl", n_bytes=round(args.megabytes * 1e6), document_bytes=args.document_bytes
        )
        print(f"{text}: {text.stat().st_size / 1e6:.1f} MB")
        commands = {NANOGPT: [str(ROOT / "scripts" / "nanogpt_prepare.py"), str(text)]}
        for tokenizer in TOKENIZERS:
            script = str(ROOT / "data" / "openwebtext" / "prepare.py")
            options = [f"--input={text}", f"--num-proc={args.num_proc}", f"--tokenizer={tokenizer}"]
            commands[f"ours, {tokenizer}"] = [script, *options, "--out"]
        peaks_bytes = {arm: run(command, measure_memory=True)[1] for arm, command in commands.items()}
        times_s: dict[str, list[float]] = {arm: [] for arm in commands}
        hashes: dict[str, str] = {}
        for _ in range(args.rounds):
            for arm, command in commands.items():
                seconds, _, hashes[arm] = run(command)
                times_s[arm].append(seconds)
            for tokenizer in TOKENIZERS:
                times_s.setdefault(f"{tokenizer}'s calls", []).append(calls_of(tokenizer, text, args.num_proc))
    rows: list[Result] = [
        {
            "arm": arm,
            "median s": round(statistics.median(times), 3),
            "fastest s": round(min(times), 3),
            "times as fast": round(
                statistics.median(theirs / ours for theirs, ours in zip(times_s[NANOGPT], times, strict=True)), 2
            ),
        }
        for arm, times in times_s.items()
    ]
    for row, arm in zip(rows, commands, strict=False):  # not the bounds
        row |= {"peak MB": round(peaks_bytes[arm] / 1e6), "SHA-256 of train.bin, val.bin": hashes[arm]}
    if len(set(hashes.values())) > 1:
        print_table(rows)
        raise SystemExit("error: the outputs differ")
    return rows


def require_documents(text: Path) -> None:
    """
    Raises:
        InputError: not all of the file can be read by all arms, or it holds less than two documents.
    """
    if not text.is_file():
        raise InputError(f"--input {text}: no such file")
    if not text.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        raise InputError(f"--input {text}: does not end in .jsonl or .parquet")
    n_documents = 0
    for document in _documents(text):
        if isinstance(document, Bad):
            reason = document.reason.removesuffix(": choose one with --text-key")  # there is none here
            raise InputError(f"--input {document.where}: {reason}")
        n_documents += 1
    if n_documents < 2:
        raise InputError(f"--input {text}: train.bin and val.bin need a document each, but it holds {n_documents}")


def _documents(text: Path) -> Iterator[str | Bad]:
    for unit in plan_units(Source("", (str(text),))):
        yield from UnitReader(unit, "text")


def run(command: list[str], *, measure_memory: bool = False) -> tuple[float, int, str]:
    """Seconds, peak bytes (0: not measured) and the hashes of what `command` writes to the folder that is added."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        environment = os.environ | {"HF_HOME": folder, "HF_DATASETS_CACHE": f"{folder}/datasets", "HF_HUB_OFFLINE": "1"}
        with open(Path(folder) / "log", "w+") as log:
            start_s = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, *command, str(out)], stdout=log, stderr=log, env=environment, start_new_session=True
            )
            peak_bytes = peak_of_session(process) if measure_memory else 0
            code = process.wait()
            seconds = time.perf_counter() - start_s
            if code:
                log.seek(0)
                raise SystemExit(f"error: {' '.join(command)} ended with {code}:\n{log.read()[-2000:]}")
        digests = [file_sha256(out / f"{split}.bin") for split in ("train", "val")]
        return seconds, peak_bytes, " ".join(digests)


def calls_of(tokenizer: EncoderName, text: Path, num_proc: int) -> float:
    """Seconds in which so many processes encode all documents of a file."""
    documents = [document for document in _documents(text) if isinstance(document, str)]
    encode = build_encoder(tokenizer)

    def encode_share(first: int) -> Iterator[int]:
        yield sum(len(encode(document)) for document in documents[first::num_proc])

    start_s = time.perf_counter()
    deque(run_in_processes(encode_share, range(num_proc), num_proc), maxlen=0)
    return time.perf_counter() - start_s


def peak_of_session(process: subprocess.Popen[bytes]) -> int:
    """The most memory that the processes of a session have together until its first one ends."""
    peak_bytes = 0
    while process.poll() is None:
        peak_bytes = max(peak_bytes, sum(map(pss_bytes, pids_of_session(process.pid))))
        time.sleep(0.01)
    return peak_bytes


def pids_of_session(session: int) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # ended meanwhile
            continue
        if int(fields[3]) == session:
            yield int(folder.name)


def build_corpus(path: Path, *, n_bytes: int, document_bytes: int) -> Path:
    """A .jsonl file of n_bytes of text, but two documents at least, and none of them twice.

    Raises:
        InputError: this machine has less.
    """
    seen: set[bytes] = set()
    left = n_bytes
    with open(path, "w") as file:
        for text in (part for whole in _texts() for part in _cut(whole, document_bytes)):
            digest = hashlib.sha256(text.encode("utf-8")).digest()
            if digest not in seen:
                seen.add(digest)
                file.write(json.dumps({"text": text}) + "\n")
                left -= len(text.encode("utf-8"))
            if left <= 0 and len(seen) > 1:  # one for each split
                return path
    raise InputError(
        f"--megabytes {n_bytes / 1e6:g}: this machine has {(n_bytes - left) / 1e6:.0f}: ask for less, or give --input"
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
    """Parts of about n characters, cut between lines."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + n) + 1 or len(text)
        yield text[start:end]
        start = end
