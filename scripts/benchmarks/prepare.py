"""bench.py prepare: nanoGPT's preparation of a corpus against ours, on the same text, to the same bytes.

Each run is a fresh process with fresh caches of the data sets; the text itself is in the page cache for all. Memory is
measured in a run of its own: the sum over all its processes of the proportional set size, in which a shared page counts
once.
"""

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from data.sotu.prepare import read_addresses
from scripts.benchmarks.timing import Result, median_ratio, print_table, pss_bytes
from scripts.lab.options import InputError

ROOT = Path(__file__).resolve().parents[2]
NANOGPT = "nanoGPT"
N_FILES = 8  # so that several processes have work of their own


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
        for tokenizer in ("tiktoken", "gigatoken"):
            options = [f"--num-proc={args.num_proc}", f"--tokenizer={tokenizer}", "--val-fraction=0.0005"]
            ours = [str(ROOT / "data/openwebtext/prepare.py"), *(f"--input={text}" for text in texts), *options]
            commands[f"ours, {tokenizer}"] = ours
        # Ours first, for it says what is wrong with a text.
        peaks_bytes = {arm: run(commands[arm], measure_memory=True)[1] for arm in reversed(commands)}
        print(f"{args.input or 'the text'}: {sum(os.path.getsize(text) for text in texts) / 1e6:.1f} MB")
        times_s: dict[str, list[float]] = {arm: [] for arm in commands}
        hashes: dict[str, str] = {}
        for _ in range(args.rounds):
            for arm, command in commands.items():
                seconds, _, hashes[arm] = run(command)
                times_s[arm].append(seconds)
    rows: list[Result] = [
        {
            "arm": arm,
            "median s": round(statistics.median(times), 3),
            "fastest s": round(min(times), 3),
            "times as fast": round(median_ratio(times_s[NANOGPT], times), 2),
            "peak MB": round(peaks_bytes[arm] / 1e6),
            "SHA-256 of train.bin, val.bin": hashes[arm],
        }
        for arm, times in times_s.items()
    ]
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
        whole_command = [sys.executable, *command, "--out", str(out)]
        with open(Path(folder) / "log", "w+") as log:
            start_s = time.perf_counter()
            process = subprocess.Popen(
                whole_command, stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True
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
        held_bytes = 0
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(ProcessLookupError):  # the process has ended meanwhile
                if os.getsid(int(folder.name)) == process.pid:
                    held_bytes += pss_bytes(folder.name)
        peak_bytes = max(peak_bytes, held_bytes)
        time.sleep(0.01)
    return peak_bytes


def write_corpus(folder: Path, *, n_bytes: int, document_bytes: int) -> list[str]:
    """Write n_bytes of text, but at least two documents, to N_FILES .jsonl files. No document occurs twice.

    Raises:
        InputError: this machine has less text.
    """
    documents: dict[str, None] = {}  # a set in the order of insertion
    n_found = 0
    for document in (part for text in _texts() for part in _cut(text, document_bytes)):
        if document not in documents:
            documents[document] = None
            n_found += len(document.encode())
        if n_found >= n_bytes and len(documents) > 1:  # one for each split
            break
    else:
        raise InputError(
            f"--megabytes {n_bytes / 1e6:g}: this machine has {n_found / 1e6:.0f}: ask for less, or give --input"
        )
    lines = [json.dumps({"text": document}) + "\n" for document in documents]
    paths = [folder / f"{i}.jsonl" for i in range(min(N_FILES, len(lines)))]
    for i, path in enumerate(paths):
        path.write_text("".join(lines[i::N_FILES]))
    return [str(path) for path in paths]


def _texts() -> Iterator[str]:
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
