"""A corpus to train.bin, val.bin and meta.json: nanoGPT's split, order and tokens, in memory that hardly grows with it.

    pass 1   shards -> processes -> parts: 00000.tokens, 00001.tokens, ...   tokens in the order of the documents
             lengths of all documents -> permutation (seed 2357) -> place of every document
    pass 2   parts -> processes -> val.bin, train.bin                        every document written at its place

Parts are in a hidden folder in the output folder, which is named by what they depend on, so the same command resumes
after a kill. The three files get their names when all is done.
"""

import contextlib
import fcntl
import hashlib
import math
import shutil
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import tiktoken

from data.corpus import TOKEN, Meta, SplitMeta, has_n_tokens, read_meta, sync_and_hash, write_meta
from data.documents import Bad, Corpus, TextFiles
from data.files import printable
from data.placement import LEAST_FRACTION, VAL_TOKENS, Lengths, lay_out, place
from data.processes import Report, run
from data.tokenizer import END_OF_TEXT, VERSIONS, Encode, encode_with_tiktoken, gigatoken_encoder, gpt2_encoding

SPOOL = ".prepare"
_PART_BYTES = 2**21  # least size of the shards of a part, and
_MOST_PARTS = 4096
_CHECK_EVERY = 200  # documents: the first of them is compared with tiktoken
_CHECKED_CHARACTERS = 2**14  # its beginning, if it is longer
_END = END_OF_TEXT.to_bytes(2, "little")


@dataclass(frozen=True)
class Job:
    """limit: only the first n documents. skip_bad: skip what cannot be read, without counting it to the limit."""

    corpus: Corpus
    gigatoken: bool
    num_proc: int
    limit: int | None = None
    skip_bad: bool = False
    val_fraction: float | None = None

    @property
    def is_single_text(self) -> bool:
        """Return whether the corpus is one .txt file, which is cut in two."""
        corpus = self.corpus
        return isinstance(corpus, TextFiles) and len(corpus.files) == 1 and corpus.files[0].endswith(".txt")

    @property
    def encode(self) -> Encode:
        return gigatoken_encoder() if self.gigatoken else encode_with_tiktoken

    def fingerprint(self) -> str:
        return self.corpus.fingerprint() + (f", first {self.limit}" if self.limit is not None else "")


def is_prepared(job: Job, out: Path) -> bool:
    """Return whether `out` holds this very corpus already."""
    with contextlib.suppress(ValueError):
        meta = read_meta(out)
        return (
            meta is not None
            and (job.skip_bad or not meta.lacks_documents)
            and meta.source_fingerprint == job.fingerprint()
            and (job.val_fraction is None or job.val_fraction == meta.val_fraction)
            and holds_tokens(out, {"train": meta.train.tokens, "val": meta.val.tokens})
        )
    return False


def holds_tokens(out: Path, n_tokens: dict[str, int]) -> bool:
    """Return whether the two files hold n_tokens, and meta.json, if there is one, says so."""
    with contextlib.suppress(ValueError):
        meta = read_meta(out)
        described = {"train": meta.train.tokens, "val": meta.val.tokens} if meta else n_tokens
        return described == n_tokens and all(has_n_tokens(out / f"{split}.bin", n) for split, n in n_tokens.items())
    return False


def prepare(job: Job, out: Path) -> Meta:
    """Write out/train.bin, out/val.bin and out/meta.json, replacing older ones when all three are whole.

    Raises:
        ValueError: a document is broken, there are too few, gigatoken's ids differ from tiktoken's, a file of the
            corpus changed meanwhile, or another process prepares a corpus in `out`.
        OSError: a file cannot be read or written.
    """
    spool = out / SPOOL
    spool.mkdir(parents=True, exist_ok=True)
    with _lock(spool):
        fingerprint = job.fingerprint()
        key = repr((fingerprint, job.gigatoken, VERSIONS, job.skip_bad, job.val_fraction))
        folder = spool / hashlib.sha256(key.encode(errors="replace")).hexdigest()[:16]
        for other in spool.iterdir():
            if other.is_dir() and other != folder:
                shutil.rmtree(other)
        folder.mkdir(exist_ok=True)
        meta = _fill(folder, job, fingerprint)
        for name in ("train.bin", "val.bin"):
            (folder / name).replace(out / name)
        write_meta(out, meta)
        shutil.rmtree(spool, ignore_errors=True)  # NFS keeps the open lock
        return meta


@contextlib.contextmanager
def _lock(spool: Path) -> Iterator[None]:
    with open(spool / "lock", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited: a child may outlive a killed parent
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{spool.parent}: another process is preparing a corpus here") from None
        except OSError as error:
            reason = f"no locks on this file system ({error.strerror}): start no second run here meanwhile"
            print(printable(f"{spool.parent}: {reason}"))
        yield


def _fill(folder: Path, job: Job, fingerprint: str) -> Meta:
    """Write train.bin and val.bin to the folder of parts, and return their description."""
    job.encode("")  # loads the encoder before the processes fork
    parts, n_bad, left_out = tokenise(folder, job)
    if job.fingerprint() != fingerprint:
        raise ValueError(f"{job.corpus.name}: changed while it was read; the same command prepares it as it is now")
    lengths = np.concatenate([np.empty(0, np.uint32), *parts])
    ends = list(accumulate(map(len, parts)))
    del parts
    if len(lengths) < 2:
        found = f"holds {len(lengths) or 'no'} document, but train and val need one each"
        advice = "give --limit 2 or more" if job.limit == 1 else left_out
        raise ValueError(f"{job.corpus.name}: {found}" + (advice and f"; {advice}"))
    if job.is_single_text:
        starts, n_val, n_val_tokens = np.array([lengths[1], 0], np.int64), 1, int(lengths[1])
    else:
        starts, n_val, n_val_tokens = lay_out(lengths, job.val_fraction)
    n_documents = {"train": len(lengths) - n_val, "val": n_val}
    n_tokens = {"train": int(lengths.sum(dtype=np.int64)) - n_val_tokens, "val": n_val_tokens}
    place(folder, job.num_proc, lengths, ends, starts, n_tokens)
    sha256 = sync_and_hash(folder)
    splits = {
        split: SplitMeta(documents=n_documents[split], tokens=n_tokens[split], sha256=sha256[split])
        for split in ("train", "val")
    }
    return Meta(
        tokenizer="gpt2",
        vocab_size=END_OF_TEXT + 1,
        encoded_by=f"gigatoken {VERSIONS['gigatoken']}" if job.gigatoken else f"tiktoken {tiktoken.__version__}",
        source=printable(job.corpus.name),
        source_fingerprint=fingerprint,
        documents_left_out=n_bad,
        train=splits["train"],
        val=splits["val"],
        left_out=left_out,
        val_fraction=job.val_fraction,
    )


def tokenise(folder: Path, job: Job) -> tuple[list[Lengths], int, str]:
    """Write the parts. Return the lengths of each part's documents up to the limit, n skipped, and why in words.

    Raises:
        ValueError: a document before the limit is broken, or has other ids than tiktoken's.
        OSError: a file cannot be read, or a part not be written.
    """
    parts: list[Lengths] = []
    n_bad, first_bad, n_wanted = 0, "", job.limit if job.limit is not None else sys.maxsize
    total, unit = (sum(job.corpus.sizes), "B") if job.limit is None else (job.limit, " documents")
    calls = enumerate(_plan_parts(job.corpus.sizes))
    results = run(_write_part, calls, (folder, job), job.num_proc, name="tokenising", total=total, unit=unit)
    with contextlib.closing(results) as done:
        for lengths, reason in done:
            is_text = lengths > 0
            lengths = lengths[np.cumsum(is_text) - is_text < n_wanted]  # skipped ones behind the limit do not count
            parts.append(lengths[lengths > 0])
            n_wanted -= len(parts[-1])
            if len(parts[-1]) < len(lengths):
                if not job.skip_bad:
                    raise ValueError(f"{reason}; --skip-bad skips what cannot be read")
                first_bad = first_bad or reason
                n_bad += len(lengths) - len(parts[-1])
            if not n_wanted:
                break
    left_out = f"{n_bad:,} document{'s' * (n_bad != 1)} could not be read and had to be skipped; the first: {first_bad}"
    return parts, n_bad, printable(left_out) if n_bad else ""


def _plan_parts(sizes: Sequence[int]) -> list[range]:
    """Return runs of shards, which do not depend on the number of processes. Sizes of 1 say nothing."""
    most = _MOST_PARTS if max(sizes, default=0) <= 1 else min(_MOST_PARTS, sum(sizes) // _PART_BYTES)
    n = max(1, min(most, len(sizes)))
    return [range(len(sizes) * i // n, len(sizes) * (i + 1) // n) for i in range(n)]


def _write_part(folder: Path, job: Job, report: Report, number: int, shards: range) -> tuple[Lengths, str]:
    """Write a part in a process, unless an earlier run did.

    Return the tokens of each document, 0 where it is skipped, and why the first is.
    """
    tokens_path, lengths_path = (folder / f"{number:05}.{kind}" for kind in ("tokens", "npz"))
    with contextlib.suppress(Exception), np.load(lengths_path) as saved:  # absent, or not whole after a power failure
        lengths, first_bad = saved["lengths"], str(saved["first_bad"])
        if has_n_tokens(tokens_path, lengths.sum(dtype=np.int64)):
            report(sum(job.corpus.sizes[i] for i in shards) if job.limit is None else len(lengths))
            return lengths, first_bad
    encode = job.encode
    written, n_texts, first_bad = array("I"), 0, ""
    with open(tokens_path, "wb") as file:
        for document, n_bytes in _documents(job, shards):
            report(n_bytes if job.limit is None else n_texts)
            if isinstance(document, Bad):
                written.append(0)
                first_bad = first_bad or str(document)
                if not job.skip_bad:
                    break
                continue
            if job.gigatoken and n_texts % _CHECK_EVERY == 0:
                _compare(encode, document[:_CHECKED_CHARACTERS])
            ids = encode(document)
            file.write(ids.astype(TOKEN).data)
            file.write(_END)
            written.append(len(ids) + 1)
            n_texts += 1
            if n_texts == job.limit:
                break
    lengths = np.frombuffer(written, np.uint32)
    with open(unfinished := folder / f"{number:05}.new", "wb") as file:
        np.savez(file, lengths=lengths, first_bad=np.array(first_bad))
    unfinished.replace(lengths_path)
    return lengths, first_bad


def _documents(job: Job, shards: range) -> Iterator[tuple[str | Bad, int]]:
    """Yield the documents of some shards, each with the bytes that are read."""
    before, is_single_text = 0, job.is_single_text
    for shard in shards:
        for document, n_bytes in job.corpus.read(shard):
            for text in cut_text(document, job) if is_single_text and isinstance(document, str) else (document,):
                yield text, before + n_bytes
        before += job.corpus.sizes[shard]


def _compare(encode: Encode, text: str) -> None:
    """Raise ValueError if an encoder gives other ids than tiktoken."""
    if not np.array_equal(encode(text), encode_with_tiktoken(text)):
        raise ValueError(
            f"gigatoken {VERSIONS['gigatoken']} gives other ids than tiktoken for the document that begins "
            f"{text[:60]!a}; use --tokenizer tiktoken"
        )


def cut_text(text: str, job: Job) -> tuple[str, str]:
    """Return what to train on of a single text, and what to validate on: its end, from the beginning of a line.

    Raises:
        ValueError: no line begins before the share of validation.
    """
    ids = job.encode(text)
    n = len(ids)
    if job.val_fraction is None:
        n_val = min(max(VAL_TOKENS, math.ceil(LEAST_FRACTION * n)), n // 10)
    else:
        n_val = math.ceil(job.val_fraction * n)
    data = text.encode()
    n_val_bytes = len(gpt2_encoding().decode_bytes(ids[n - n_val :].tolist()))
    cut = data.rfind(b"\n", 0, len(data) - n_val_bytes) + 1
    if cut == 0:
        raise ValueError(
            f"{job.corpus.name}: no line begins before its last {n_val:,} tokens, at which train and val could be cut"
        )
    return data[:cut].decode(), data[cut:].decode()
