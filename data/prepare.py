"""A corpus to train.bin, val.bin and meta.json: nanoGPT's split, order and tokens, in memory that hardly grows with it.

    pass 1   shards -> processes -> parts: 00000.tokens, 00001.tokens, ...   tokens in the order of the documents
             lengths of all documents -> permutation (seed 2357) -> place of every document
    pass 2   parts -> processes -> val.bin, train.bin                        every document written at its place

Parts are in a hidden folder in the output folder. Each is whole or absent, and named by what it depends on, so the same
command resumes after a kill. The three files get their names when all is done.
"""

import contextlib
import fcntl
import hashlib
import math
import os
import shutil
import signal
import sys
import threading
from array import array
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tiktoken

from data.corpus import TOKEN, Meta, SplitMeta, has_n_tokens, new_file, read_meta, sync_and_hash, write_meta
from data.documents import Bad, Corpus, TextFiles, printable
from data.tokenizer import END_OF_TEXT, VERSIONS, Encode, encode_with_tiktoken, gigatoken_encoder, gpt2_encoding

SPOOL = ".prepare"
SEED = 2357
VAL_TOKENS = 20_000  # in validation at least, where no fraction is given, within
LEAST_FRACTION = 0.0005  # and a tenth of all documents
_PART_BYTES = 2**21  # least size of the shards of a part, and
_MOST_PARTS = 4096
_CHECK_EVERY = 200  # documents: the first of them is compared with tiktoken
_END = END_OF_TEXT.to_bytes(2, "little")
_CHECKED_CHARACTERS = 2**14  # its beginning, if it is longer
_BLOCK = 2**15  # documents whose places are Python numbers at once

Lengths = npt.NDArray[np.uint32]  # tokens of each document, shape (n_documents,)


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


class Layout(NamedTuple):
    """starts: the token at which a document starts in val.bin followed by train.bin, shape (n_documents,) int64."""

    starts: npt.NDArray[np.int64]
    n_val: int  # documents
    n_val_tokens: int


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
    """Return whether the two files hold so many tokens, and nothing says that they are of another corpus.

    A meta.json with other numbers does, or, without one, the parts of a run that was killed while it renamed.
    """
    with contextlib.suppress(ValueError):
        meta = read_meta(out)
        described = {"train": meta.train.tokens, "val": meta.val.tokens} if meta else n_tokens
        sizes_fit = all(has_n_tokens(out / f"{split}.bin", n) for split, n in n_tokens.items())
        return sizes_fit and described == n_tokens and (meta is not None or not (out / SPOOL).exists())
    return False


def prepare(job: Job, out: Path) -> Meta:
    """Write out/train.bin, out/val.bin and out/meta.json, replacing older ones when all three are whole.

    Raises:
        ValueError: a document is broken, there are too few, gigatoken's ids differ from tiktoken's, a file of the
            corpus changed meanwhile, or another process prepares a corpus in `out`.
        OSError: a file cannot be read or written.
    """
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    spool = out / SPOOL
    spool.mkdir(parents=True, exist_ok=True)
    with _alone(spool):
        try:
            fingerprint = job.fingerprint()  # recorded is what was there at the start
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
            shutil.rmtree(folder)
            return meta
        finally:
            if not any(spool.glob("*/*.npz")):  # nothing to resume from
                shutil.rmtree(spool, ignore_errors=True)
            for parent in created:
                with contextlib.suppress(OSError):  # not empty
                    parent.rmdir()


@contextlib.contextmanager
def _alone(spool: Path) -> Iterator[None]:
    with open(spool / "lock", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited: a child may outlive a killed parent
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{spool.parent}: another process is preparing a corpus here") from None
        except OSError as error:
            print(
                f"{spool.parent}: no locks on this file system ({error.strerror}): start no second run here meanwhile"
            )
        yield


def _fill(folder: Path, job: Job, fingerprint: str) -> Meta:
    """Write train.bin and val.bin to the folder of parts, and return their description."""
    job.encode("")  # loads the encoder before the processes fork
    parts, left_out = tokenise(folder, job)
    if job.fingerprint() != fingerprint:
        shutil.rmtree(folder)
        raise ValueError(f"{job.corpus.name}: changed while it was read; the same command prepares it as it is now")
    n_bad = sum(int(np.count_nonzero(part == 0)) for part in parts)
    lengths = np.concatenate([np.empty(0, np.uint32), *(part[part > 0] for part in parts)])
    if len(lengths) < 2:
        shutil.rmtree(folder)
        raise ValueError(_too_few(len(lengths), left_out, job))
    if job.is_single_text:
        layout = Layout(np.array([lengths[1], 0], np.int64), 1, int(lengths[1]))
    else:
        layout = lay_out(lengths, job.val_fraction)
    n_documents = {"train": len(lengths) - layout.n_val, "val": layout.n_val}
    n_tokens = {"train": int(lengths.sum(dtype=np.int64)) - layout.n_val_tokens, "val": layout.n_val_tokens}
    del lengths
    place(folder, job, parts, layout, n_tokens)
    sha256 = sync_and_hash(folder)
    train, val = (
        SplitMeta(documents=n_documents[split], tokens=n_tokens[split], sha256=sha256[split])
        for split in ("train", "val")
    )
    encoder = "gigatoken" if job.gigatoken else "tiktoken"
    return Meta(
        tokenizer="gpt2",
        vocab_size=END_OF_TEXT + 1,
        encoded_by=f"{encoder} {VERSIONS[encoder] if job.gigatoken else tiktoken.__version__}",
        source=printable(job.corpus.name),
        source_fingerprint=fingerprint,
        documents_left_out=n_bad,
        train=train,
        val=val,
        left_out=left_out,
        val_fraction=job.val_fraction,
    )


def _too_few(n_documents: int, left_out: str, job: Job) -> str:
    message = f"{job.corpus.name}: holds {n_documents or 'no'} document, but train and val need one each"
    if left_out:
        return f"{message}; {left_out}"
    return message + ("; give --limit 2 or more" if job.limit == n_documents else "")


def tokenise(folder: Path, job: Job) -> tuple[list[Lengths], str]:
    """Write the parts, and return the lengths of the documents in each, up to the limit, and what was skipped.

    Raises:
        ValueError: a document before the limit is broken, or has other ids than tiktoken's.
        OSError: a file cannot be read, or a part not be written.
    """
    parts: list[Lengths] = []
    first_bad = ""
    n_documents = n_bad = 0
    total, unit = (sum(job.corpus.sizes), "B") if job.limit is None else (job.limit, " documents")
    calls = [(folder, number, run) for number, run in enumerate(_plan_parts(job.corpus.sizes))]
    with contextlib.closing(_run(_write_part, calls, job, job.num_proc, "tokenising", total, unit)) as finished:
        for number in finished:
            lengths, reason = read_part(folder, number)
            if job.limit is not None:
                kept = lengths > 0
                lengths = lengths[
                    np.cumsum(kept) - kept < job.limit - n_documents
                ]  # skipped ones behind it do not count
            if not lengths.all():
                if not job.skip_bad:
                    raise ValueError(f"{reason}; --skip-bad skips what cannot be read")
                first_bad = first_bad or reason
                n_bad += int(np.count_nonzero(lengths == 0))
            parts.append(lengths)
            n_documents += np.count_nonzero(lengths)
            if n_documents == job.limit:
                break
    what = f"{n_bad:,} document{'s' * (n_bad != 1)} could not be read and had to be skipped; the first: {first_bad}"
    return parts, printable(what) if n_bad else ""


def _plan_parts(sizes: Sequence[int]) -> Iterator[range]:
    """Yield runs of shards, which do not depend on the number of processes."""
    least = max(_PART_BYTES if max(sizes, default=0) > 1 else 1, sum(sizes) // _MOST_PARTS)
    first = taken = 0
    for shard, size in enumerate(sizes):
        taken += size
        if taken >= least or shard + 1 == len(sizes):
            yield range(first, shard + 1)
            first, taken = shard + 1, 0


def part_paths(folder: Path, number: int) -> tuple[Path, Path]:
    """Return the files of a part: its tokens, and the lengths of its documents, which appears when both are whole."""
    return folder / f"{number:05}.tokens", folder / f"{number:05}.npz"


def read_part(folder: Path, number: int) -> tuple[Lengths, str]:
    """Return the tokens of each document of a part, 0 where it is skipped, and why the first is.

    Raises:
        OSError, ValueError: there is no such part, or not all of it.
    """
    tokens_path, lengths_path = part_paths(folder, number)
    with np.load(lengths_path) as saved:
        lengths, first_bad = saved["lengths"], str(saved["first_bad"])
    if not has_n_tokens(tokens_path, lengths.sum(dtype=np.int64)):
        raise ValueError(f"{tokens_path}: is not whole")
    return lengths, first_bad


def _write_part(folder: Path, number: int, shards: range) -> None:
    """Write a part in a process, unless an earlier run did."""
    job: Job = _state
    with contextlib.suppress(OSError, ValueError):
        lengths, _ = read_part(folder, number)
        _count(sum(job.corpus.sizes[i] for i in shards) if job.limit is None else len(lengths))
        return
    encode, limit = job.encode, job.limit if job.limit is not None else sys.maxsize
    lengths, n_bad, first_bad = array("I"), 0, ""
    tokens_path, lengths_path = part_paths(folder, number)
    with new_file(tokens_path) as file:
        for document in _documents(job, shards):
            if isinstance(document, Bad):
                lengths.append(0)
                n_bad, first_bad = n_bad + 1, first_bad or str(document)
                if not job.skip_bad:
                    break
                continue
            ids = encode(document)
            if len(lengths) % _CHECK_EVERY == 0 and job.gigatoken:
                _compare(encode, document[:_CHECKED_CHARACTERS])
            file.write(ids.astype(TOKEN).data)
            file.write(_END)
            lengths.append(len(ids) + 1)
            if len(lengths) - n_bad >= limit:
                break
    with new_file(lengths_path) as file:
        np.savez(file, lengths=np.frombuffer(lengths, np.uint32), first_bad=np.array(first_bad))


def _documents(job: Job, shards: range) -> Iterator[str | Bad]:
    """Yield the documents of some shards, and count what is read."""
    for shard in shards:
        counted = n = 0
        for n, (document, n_bytes) in enumerate(job.corpus.read(shard), 1):
            yield from cut_text(document, job) if job.is_single_text and isinstance(document, str) else (document,)
            if n % 256 == 0:
                n_read = n_bytes if job.limit is None else n
                _count(n_read - counted)
                counted = n_read
        _count((job.corpus.sizes[shard] if job.limit is None else n) - counted)


def _compare(encode: Encode, text: str) -> None:
    """Raise ValueError if an encoder gives other ids than tiktoken."""
    if not np.array_equal(encode(text), encode_with_tiktoken(text)):
        beginning = text[:60] + "..." * (len(text) > 60)
        raise ValueError(
            f"gigatoken {VERSIONS['gigatoken']} gives other ids than tiktoken for the document that begins "
            f"{beginning!a}; use --tokenizer tiktoken"
        )


def lay_out(lengths: Lengths, val_fraction: float | None) -> Layout:
    """Return where each document goes: as datasets' train_test_split(test_size=val_fraction, seed=2357) has them.

    None means the fewest shuffled documents that hold VAL_TOKENS, at least LEAST_FRACTION and at most a tenth.

    Raises:
        ValueError: nothing is left to train on.
    """
    n = len(lengths)
    order = np.arange(n, dtype=np.uint32)  # half the memory of rng.permutation(n), and the same order
    np.random.default_rng(SEED).shuffle(order)
    if val_fraction is None:
        most = max(1, n // 10)
        fewest = 1 + int(np.searchsorted(np.cumsum(lengths[order[:most]], dtype=np.int64), VAL_TOKENS))
        n_val = min(max(fewest, math.ceil(LEAST_FRACTION * n)), most)
    else:
        n_val = math.ceil(val_fraction * n)
    if n_val == n:
        raise ValueError(f"--val-fraction {val_fraction:g} of {n} documents leaves none to train on")
    starts = np.empty(n, np.int64)
    n_val_tokens = end = 0
    for first in range(0, n, _BLOCK):
        block = order[first : first + _BLOCK]
        ends = end + np.cumsum(lengths[block], dtype=np.int64)
        starts[block] = ends - lengths[block]
        end = int(ends[-1])
        if first < n_val <= first + len(block):
            n_val_tokens = int(ends[n_val - 1 - first])
    return Layout(starts, n_val, n_val_tokens)


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
    token_bytes = np.array([len(gpt2_encoding().decode_single_token_bytes(i)) for i in range(END_OF_TEXT)])
    data = text.encode()
    cut = data.rfind(b"\n", 0, len(data) - int(token_bytes[ids[n - n_val :]].sum())) + 1
    if cut == 0:
        raise ValueError(
            f"{job.corpus.name}: no line begins before its last {n_val:,} tokens, at which train and val could be cut"
        )
    return data[:cut].decode(), data[cut:].decode()


def place(folder: Path, job: Job, parts: list[Lengths], layout: Layout, n_tokens: dict[str, int]) -> None:
    """Write the documents of all parts to train.bin and val.bin, and delete every part when it is written."""
    for split, n in n_tokens.items():
        path = folder / f"{split}.bin"
        path.unlink(missing_ok=True)  # a process of a killed run may still hold it
        with open(path, "wb") as file:
            file.truncate(n * TOKEN.itemsize)
    firsts = [0, *accumulate(int(np.count_nonzero(part)) for part in parts)]
    calls = [(folder, number, firsts[number]) for number in range(len(parts))]
    total = sum(n_tokens.values()) * TOKEN.itemsize
    with contextlib.closing(_run(_place_part, calls, (parts, layout), job.num_proc, "placing", total)) as finished:
        for number in finished:
            tokens_path, lengths_path = part_paths(folder, number)
            lengths_path.unlink()  # first: a run that is killed here makes the part again
            tokens_path.unlink()


def _place_part(folder: Path, number: int, first: int) -> None:
    """Write the documents of a part, of which `first` is the first one, to their places, in a process."""
    parts, layout = _state
    lengths = parts[number][parts[number] > 0]
    with (
        open(part_paths(folder, number)[0], "rb") as tokens,
        open(folder / "train.bin", "rb+") as train,
        open(folder / "val.bin", "rb+") as val,
    ):
        for i in range(0, len(lengths), _BLOCK):
            n_bytes = lengths[i : i + _BLOCK].astype(np.int64) * TOKEN.itemsize
            starts = layout.starts[first + i : first + i + len(n_bytes)]
            in_train = starts >= layout.n_val_tokens
            offsets = (starts - in_train * layout.n_val_tokens) * TOKEN.itemsize
            fds = np.where(in_train, train.fileno(), val.fileno())
            for n, fd, offset in zip(n_bytes.tolist(), fds.tolist(), offsets.tolist(), strict=True):
                _write_at(fd, tokens.read(n), offset)
            _count(int(n_bytes.sum()))


def _write_at(fd: int, data: bytes, offset: int) -> None:
    while len(data) > (n_written := os.pwrite(fd, data, offset)):  # less: the next try says why
        data, offset = data[n_written:], offset + n_written


def _run(
    task: Callable[..., None],
    calls: list[tuple[Any, ...]],
    state: object,
    num_proc: int,
    name: str,
    total: int,
    unit: str = "B",
) -> Generator[int]:
    """Run the calls of a task in processes, which see `state`. Yields the number of each call in order when it is done.

    Closing the iterator kills the processes.

    Raises:
        ValueError, OSError: the task did.
        ChildProcessError: a process died.
    """
    context = get_context("fork")  # the processes inherit the names of millions of files, and the encoder
    done = context.Value("q", 0)
    pool = ProcessPoolExecutor(min(num_proc, len(calls)), context, _start_process, (state, done))
    try:
        futures = [pool.submit(task, *call) for call in calls]
        from tqdm import tqdm  # now, for it takes a while, in which the processes work

        tqdm.monitor_interval = 0  # no thread: pass 2 forks again
        rare_s = 0.1 if sys.stderr.isatty() else 10  # in a log file each update is a line
        with tqdm(total=total, desc=name, unit=unit, unit_scale=True, delay=rare_s, mininterval=rare_s) as bar:
            for number, future in enumerate(futures):
                while wait([future], timeout=0.1).not_done:
                    bar.update(min(done.value, total) - bar.n)
                future.result()
                bar.update(min(done.value, total) - bar.n)
                yield number
    except BrokenProcessPool:
        raise ChildProcessError("a process was killed, perhaps for want of memory") from None
    finally:
        for child in active_children():
            child.terminate()
        pool.shutdown(cancel_futures=True)


_state: Any = None  # in a process: what its tasks see, and how much they have done
_done: Any = None


def _start_process(state: object, done: object) -> None:
    global _state, _done
    _state, _done = state, done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _count(n: int) -> None:
    with _done.get_lock():
        _done.value += n
