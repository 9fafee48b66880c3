"""A corpus to train.bin, val.bin and meta.json, in memory that hardly grows with it.

Pass 1 (data/tokenise.py) fills the spool, a hidden folder in the output folder. Then the lengths of all documents are
known, and with them the places to which pass 2 (data/placement.py) writes them. Both go on where an earlier run was
stopped. Files get their names in the output folder when all is done.
"""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data import placement
from data.documents import Source
from data.meta import NAME as META
from data.meta import Meta, SplitMeta, read_meta, settle, write_meta
from data.spool import part_paths, read_lengths
from data.token_file import is_complete
from data.tokenise import Job, tokenise

SPOOL = ".prepare"
_FORMAT = 1  # of the spool; one of another format is thrown away


def is_prepared(out: Path, source: Source, limit: int | None) -> bool:
    """Whether `out` holds this very corpus already."""
    try:
        meta = read_meta(out)
    except ValueError:
        return False
    return (
        meta is not None
        and meta.source_fingerprint == _fingerprint(source, limit)
        and is_complete(out / "train.bin", meta.train.tokens)
        and is_complete(out / "val.bin", meta.val.tokens)
    )


def prepare(job: Job, out: Path, *, num_proc: int) -> Meta:
    """Writes out/train.bin, out/val.bin and out/meta.json, replacing older ones when all three are whole.

    Raises:
        ValueError: a document is broken, there are fewer than two, or the ids of one are not the reference's.
        OSError: a file cannot be read or written; what is done is kept for the next run.
    """
    spool = out / SPOOL
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    spool.mkdir(parents=True, exist_ok=True)
    try:
        with _alone(spool):
            _keep_if_of_(spool, job)
            if not (spool / META).exists():
                plan = _fill_(spool, job, num_proc)
                _describe_(spool, job, plan)
            return _publish_(spool, out)
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


def _keep_if_of_(spool: Path, job: Job) -> None:
    """Empties a spool that is of another job, else removes only what a kill left half-written."""
    # Not skip_bad: it decides which parts can be used, not what they hold.
    identity = {
        "format": _FORMAT,
        "source": _fingerprint(job.source, job.limit),
        "encoder": f"{job.encoder.name} {job.encoder.version}",
    }
    record = spool / "job.json"
    same = False
    with contextlib.suppress(FileNotFoundError, ValueError):
        same = json.loads(record.read_text()) == identity
    for path in spool.iterdir():
        if path.name != "lock" and (not same or path.suffix.strip(".").isdigit()):
            path.unlink()
    if not same:
        temporary = spool / "job.tmp"
        temporary.write_text(json.dumps(identity))
        temporary.replace(record)


def _fill_(spool: Path, job: Job, num_proc: int) -> placement.Plan:
    """Both passes: after them spool/train.bin and spool/val.bin hold everything."""
    plan = placement.load(spool)
    if plan is not None and plan.n_bad and not job.skip_bad:
        for path in (*part_paths(spool), spool / placement.NAME):
            path.unlink()
        plan = None
    if plan is None:
        parts = tokenise(spool, job, num_proc)
        lengths = [np.empty(0, np.uint32), *(read_lengths(part) for part in parts)]
        plan = placement.Plan(
            np.concatenate(lengths)[: job.limit],
            [part.path.name for part in parts],
            [part.n_documents for part in parts],
            sum(part.n_bad for part in parts),
        )
        if len(plan.lengths) < 2:
            for part in parts:
                part.path.unlink()
            raise ValueError(_too_few(len(plan.lengths), plan.n_bad, job.source.name))
        placement.save(spool, plan)
    placement.place(spool, plan, num_proc)
    return plan


def _too_few(n_documents: int, n_bad: int, name: str) -> str:
    number = "1 document" if n_documents else "no document"
    left_out = f" ({n_bad} cannot be read)" if n_bad else ""
    return (
        f"{name}: holds {number}{left_out}, but train and val need one each; "
        "cut the text into several .txt files, or into the lines of a .jsonl file"
    )


def _describe_(spool: Path, job: Job, plan: placement.Plan) -> None:
    """Writes spool/meta.json, with which only the renames are left to do."""
    layout = placement.lay_out(plan.lengths)
    sha256 = settle(spool)
    n_documents = {"train": len(plan.lengths) - layout.n_val, "val": layout.n_val}
    n_tokens = {"train": layout.n_tokens - layout.n_val_tokens, "val": layout.n_val_tokens}
    train, val = (SplitMeta(n_documents[split], n_tokens[split], sha256[split]) for split in ("train", "val"))
    meta = Meta(
        tokenizer="gpt2",
        vocab_size=job.encoder.vocab_size,
        encoded_by=f"{job.encoder.name} {job.encoder.version}",
        source=job.source.name,
        source_fingerprint=_fingerprint(job.source, job.limit),
        documents_left_out=plan.n_bad,
        train=train,
        val=val,
    )
    write_meta(spool / META, meta)


def _publish_(spool: Path, out: Path) -> Meta:
    """Moves the files to where they are looked for, meta.json last: it says that there are some to move."""
    meta = read_meta(spool)
    assert meta is not None
    for name in ("train.bin", "val.bin", META):
        with contextlib.suppress(FileNotFoundError):  # moved by a run that was stopped
            (spool / name).replace(out / name)
    shutil.rmtree(spool)
    return meta


def _remove_if_useless(spool: Path, created: list[Path]) -> None:
    """Removes a spool from which no run could go on, and the folders that were made for it."""
    if spool.exists() and not part_paths(spool) and not any((spool / name).exists() for name in (placement.NAME, META)):
        shutil.rmtree(spool, ignore_errors=True)
    for folder in created:
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


def _fingerprint(source: Source, limit: int | None) -> str:
    return source.fingerprint() + (f", first {limit}" if limit is not None else "")
