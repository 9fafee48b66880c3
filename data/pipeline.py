"""A corpus to train.bin, val.bin and meta.json, in memory that hardly grows with it.

Pass 1 (data/tokenise.py) fills the spool, a hidden folder in the output folder. Then the lengths of all documents are
known, and with them the places to which pass 2 (data/placement.py) writes them. Both go on where an earlier run was
stopped. Files get their names in the output folder when all is done.

In the spool each job has a folder that is named by what its files depend on, so what one left behind is never taken for
another's. There is one at a time: the next job removes it.
"""

import contextlib
import fcntl
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np

from data import placement
from data.documents import Source, Unit, plan_units
from data.meta import NAME as META
from data.meta import Meta, SplitMeta, file_sha256, read_meta, sync_and_hash, write_meta
from data.spool import Part, read_lengths
from data.token_file import has_n_tokens
from data.tokenise import Job, tokenise

SPOOL = ".prepare"
_FORMAT = 3  # of the spool; one of another format is thrown away


def is_prepared(out: Path, source: Source, limit: int | None, *, skip_bad: bool) -> bool:
    """Whether `out` holds this very corpus already; where documents are left out, only skip_bad wants it so."""
    try:
        meta = read_meta(out)
    except ValueError:
        return False
    return (
        meta is not None
        and (skip_bad or not meta.lacks_documents)
        and meta.source_fingerprint == _fingerprint(source, limit)
        and holds_tokens(out, {"train": meta.train.tokens, "val": meta.val.tokens})
    )


def holds_tokens(out: Path, n_tokens: dict[str, int]) -> bool:
    """Whether train.bin and val.bin have so many tokens, and nothing says that they are of another corpus.

    Those say so: a meta.json with other numbers, or one in the spool, of a run that was stopped among the renames.
    """
    try:
        meta = read_meta(out)
    except ValueError:
        return False
    return (
        (meta is None or {"train": meta.train.tokens, "val": meta.val.tokens} == n_tokens)
        and all(has_n_tokens(out / f"{split}.bin", n) for split, n in n_tokens.items())
        and not any((out / SPOOL).glob(f"*/{META}"))
    )


def prepare(job: Job, out: Path, *, num_proc: int) -> Meta:
    """Writes out/train.bin, out/val.bin and out/meta.json, replacing older ones when all three are whole.

    Raises:
        ValueError: a document is broken, there are fewer than two, the ids of one are not the reference's, a file of
            the source changed meanwhile, or another process prepares a corpus in `out`.
        OSError: a file cannot be read or written; what is done is kept for the next run.
    """
    spool = out / SPOOL
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    spool.mkdir(parents=True, exist_ok=True)
    with _alone(spool):
        try:
            fingerprint = _fingerprint(job.source, job.limit)  # once: what is recorded is what was there at the start
            folder = _only_folder_of(spool, job, fingerprint)
            if not _is_filled(folder, out, job):
                plan = _fill(folder, job, fingerprint, num_proc)
                _describe_(folder, job, fingerprint, plan)
            return _publish(folder, out)
        finally:
            _remove_if_useless(spool, created)


@contextlib.contextmanager
def _alone(spool: Path) -> Iterator[None]:
    with open(spool / "lock", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited: a child may outlive a killed parent
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{spool.parent}: another process is preparing a corpus here") from None
        yield


def _only_folder_of(spool: Path, job: Job, fingerprint: str) -> Path:
    """The folder of a job, after removing those of others, and what a kill left half-written in it."""
    # Not skip_bad: it decides which parts can be used, not what they hold.
    identity = f"format {_FORMAT}, {job.encoder.name} {job.encoder.version}, {fingerprint}"
    folder = spool / hashlib.sha256(identity.encode()).hexdigest()[:16]
    for path in spool.iterdir():
        if path not in (folder, spool / "lock"):
            _discard_(path)
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.suffix.strip(".").isdigit():
            path.unlink()
    return folder


def _discard_(path: Path) -> None:
    """Removes a file or folder of the spool, at once as far as its name goes.

    What is left of it when this is stopped is no job's, and a process that outlived a kill finds no place to write to.
    """
    doomed = tempfile.mkdtemp(dir=path.parent)
    path.rename(Path(doomed) / path.name)
    shutil.rmtree(doomed)


def _is_filled(folder: Path, out: Path, job: Job) -> bool:
    """Whether the files of the corpus are whole: in the folder of the job, or in `out`, by a run that was stopped."""
    meta = read_meta(folder)
    if meta is None or (meta.lacks_documents and not job.skip_bad):
        return False
    return all(
        has_n_tokens(folder / name, split.tokens)
        or (has_n_tokens(out / name, split.tokens) and file_sha256(out / name) == split.sha256)
        for name, split in (("train.bin", meta.train), ("val.bin", meta.val))
    )


def _fill(folder: Path, job: Job, fingerprint: str, num_proc: int) -> placement.Plan:
    """Both passes: after them train.bin and val.bin in the folder hold everything."""
    plan = placement.load(folder)
    useless = plan is not None and ((plan.left_out and not job.skip_bad) or not placement.is_whole(folder, plan))
    if (folder / META).exists() or useless:
        for name in (placement.NAME, META):  # the plan first: by it, parts that are missing are placed
            (folder / name).unlink(missing_ok=True)
        plan = None
    if plan is None:
        units = plan_units(job.source)
        plan = _plan(tokenise(folder, job, units, num_proc), units, job.limit)
        if _fingerprint(job.source, job.limit) != fingerprint:
            _discard_(folder)
            raise ValueError(f"{job.source.name}: changed while it was read; the same command prepares it as it is now")
        if len(plan.lengths) < 2:
            _discard_(folder)
            raise ValueError(_too_few(len(plan.lengths), plan.left_out, job))
        placement.save(folder, plan)
    placement.place(folder, plan, num_proc)
    return plan


def _plan(parts: list[Part], units: list[Unit], limit: int | None) -> placement.Plan:
    lengths = np.concatenate([np.empty(0, np.uint32), *(read_lengths(part) for part in parts)])
    if limit is not None:
        kept = lengths > 0
        lengths = lengths[np.cumsum(kept) - kept < limit]  # before them are fewer: neither is a left out one behind
    n_bad = int(np.count_nonzero(lengths == 0))
    lengths = lengths[lengths > 0]
    part_documents = [part.n_documents for part in parts]
    cut_files = [
        units[part.unit].paths[0]
        for part, n in zip(parts, accumulate(part_documents), strict=True)
        if part.breaks_off and (limit is None or n < limit)
    ]
    first = next((part.first_bad for part in parts if part.first_bad), "")
    left_out = _left_out(n_bad, cut_files, first) if n_bad or cut_files else ""
    return placement.Plan(lengths, [part.path.name for part in parts], part_documents, n_bad, left_out)


def _left_out(n_bad: int, cut_files: list[str], first: str) -> str:
    what = [_number(n_bad, "document")] if n_bad else []
    if cut_files:
        names = ", ".join(cut_files[:3]) + ", ..." * (len(cut_files) > 3)
        what.append(f"an unknown rest of {_number(len(cut_files), 'file')} ({names})")
    text = f"{' and '.join(what)} could not be read and had to be left out; the first: {first}"
    return text.encode(errors="backslashreplace").decode()  # a terminal takes no name that is not UTF-8


def _number(n: int, what: str) -> str:
    return f"{n:,} {what}" + "s" * (n != 1)


def _too_few(n_documents: int, left_out: str, job: Job) -> str:
    message = f"{job.source.name}: holds {n_documents or 'no'} document, but train and val need one each"
    if left_out:
        return f"{message}; {left_out}"
    if job.limit == n_documents:
        return f"{message}; give --limit 2 or more"
    cut = "; cut the text into several .txt files, or into the lines of a .jsonl file"
    return message + (cut if n_documents else "")


def _describe_(folder: Path, job: Job, fingerprint: str, plan: placement.Plan) -> None:
    """Writes the folder's meta.json, with which only the renames are left to do."""
    layout = placement.lay_out(plan.lengths)
    sha256 = sync_and_hash(folder)
    n_documents = {"train": len(plan.lengths) - layout.n_val, "val": layout.n_val}
    n_tokens = {"train": layout.n_tokens - layout.n_val_tokens, "val": layout.n_val_tokens}
    train, val = (SplitMeta(n_documents[split], n_tokens[split], sha256[split]) for split in ("train", "val"))
    meta = Meta(
        tokenizer="gpt2",
        vocab_size=job.encoder.vocab_size,
        encoded_by=f"{job.encoder.name} {job.encoder.version}",
        source=job.source.name,
        source_fingerprint=fingerprint,
        documents_left_out=plan.n_bad,
        train=train,
        val=val,
        left_out=plan.left_out,
    )
    write_meta(folder / META, meta)


def _publish(folder: Path, out: Path) -> Meta:
    """Moves the files to where they are looked for, meta.json last: it says that there are some to move."""
    meta = read_meta(folder)
    assert meta is not None
    (folder / placement.NAME).unlink(missing_ok=True)  # no run may fill anew the files that are moved
    for name in ("train.bin", "val.bin", META):
        with contextlib.suppress(FileNotFoundError):  # moved by a run that was stopped
            (folder / name).replace(out / name)
    _discard_(folder)
    return meta


def _remove_if_useless(spool: Path, created: list[Path]) -> None:
    """Removes a spool from which no run could go on, and the folders that were made for it."""
    if not any(path.suffix == ".part" or path.name in (placement.NAME, META) for path in spool.glob("*/*")):
        shutil.rmtree(spool, ignore_errors=True)
    for folder in created:
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


def _fingerprint(source: Source, limit: int | None) -> str:
    return source.fingerprint() + (f", first {limit}" if limit is not None else "")
