"""Pass 1 of a preparation: the units of a source, in parallel, to parts of the spool in source order."""

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from data.documents import Bad, Source, Unit, UnitReader
from data.encoders import Encoder, Ids
from data.progress import Progress
from data.spool import Part, intact_tokens, part_path, read_part, write_part
from data.token_file import TOKEN
from data.workers import run_in_processes

_PART_TOKENS = 2**22  # that a process holds before it writes a part, and
_PART_DOCUMENTS = 2**17  # if they are short: each takes a few hundred bytes of Python's objects
_SMALL_BYTES = 2**20  # of text, for which no process is worth its start
_CHECKED = 0.005  # of the text is compared with the reference, and
_CHECKED_CHARACTERS = 2**14  # so much of each unit in any case; of a longer document its beginning


@dataclass(frozen=True)
class Job:
    """limit: only the first so many documents. skip_bad: leave out what cannot be read, not counting it."""

    source: Source
    encoder: Encoder
    limit: int | None = None
    skip_bad: bool = False


def tokenise(folder: Path, job: Job, units: list[Unit], num_proc: int) -> list[Part]:
    """The parts of all documents up to the limit (more may follow in them), in the order of the documents.

    Raises:
        ValueError: a document is broken, or the ids of one are not the reference's.
        OSError: a file cannot be read, or a part not be written.
    """
    n_bytes = sum(unit.n_bytes for unit in units)
    num_proc = min(num_proc, len(units), 1 + n_bytes // _SMALL_BYTES)
    try:
        return _tokenise_units(folder, job, units, n_bytes, num_proc)
    except (ValueError, OSError):
        if job.limit is None or num_proc <= 1:
            raise
    # Perhaps behind the limit, where several processes read too: alone, one goes no further than the limit.
    return _tokenise_units(folder, job, units, n_bytes, 1)


def _tokenise_units(folder: Path, job: Job, units: list[Unit], n_bytes: int, num_proc: int) -> list[Part]:
    parts: list[Part] = []
    task = functools.partial(_tokenise_unit, folder, job, units)
    items = _needed(len(units), parts, sys.maxsize if job.limit is None else job.limit)
    answers = run_in_processes(task, items, num_proc)
    total, unit = (n_bytes, "B") if job.limit is None else (job.limit, " documents")
    with contextlib.closing(answers), Progress("tokenising", total, unit) as progress:
        for part, part_bytes in answers:
            parts.append(part)
            progress.add(part_bytes if job.limit is None else part.n_documents, part.n_tokens)
    return sorted(parts)


def _needed(n_units: int, parts: list[Part], limit: int) -> Iterator[tuple[int, int]]:
    """The numbers of units, each with how many of its documents are needed at most, until `limit` are there.

    parts: those that are done; grows. What counts are the documents before the first unit that is not done.
    """
    n_documents: Counter[int] = Counter()  # by unit
    done: set[int] = set()
    n_seen = first_open = n_before = 0
    for number in range(n_units):
        for part in parts[n_seen:]:
            n_documents[part.unit] += part.n_documents
            if part.last:
                done.add(part.unit)
        n_seen = len(parts)
        while first_open in done:
            n_before += n_documents[first_open]
            first_open += 1
        if n_before >= limit:
            return
        yield number, limit - n_before


def _tokenise_unit(folder: Path, job: Job, units: list[Unit], needed: tuple[int, int]) -> Iterator[tuple[Part, int]]:
    """The parts of a unit, each with its bytes of Unit.n_bytes: those that an earlier run wrote, then new ones."""
    number, limit = needed
    n_parts = n_read = n_documents = 0
    while part := _usable(part_path(folder, number, n_parts), job):
        yield part, units[number].n_bytes if part.last else 0  # the bytes of the others count with the next new one
        if part.last:
            return
        n_parts += 1
        n_documents += part.n_documents
        n_read += part.n_read
    reader = UnitReader(units[number], job.source.text_key)
    documents = islice(reader, n_read, None)
    told_bytes = 0
    for n, batch in enumerate(_batches(_encode(documents, job), job.encoder.end_of_text, limit - n_documents), n_parts):
        lengths = np.array(batch.lengths, dtype=np.uint32)
        part = write_part(
            part_path(folder, number, n),
            lengths,
            batch.tokens[: batch.n_tokens],
            last=batch.last,
            breaks_off=batch.breaks_off,
            first_bad=batch.first_bad,
        )
        done_bytes = units[number].n_bytes if batch.last else reader.done_bytes
        yield part, done_bytes - told_bytes
        told_bytes = done_bytes


def _usable(path: Path, job: Job) -> Part | None:
    part = read_part(path)
    return part if part and (job.skip_bad or not part.first_bad) and intact_tokens(part) is not None else None


class _Batch:
    """The documents of a part, each of them ids and an end of text."""

    def __init__(self) -> None:
        self.tokens = np.empty(_PART_TOKENS, TOKEN)  # n_tokens, and room for more
        self.clear()

    def clear(self) -> None:
        self.n_tokens = 0
        self.lengths: list[int] = []  # tokens of each document; 0: left out
        self.last = self.breaks_off = False
        self.first_bad = ""

    def leave_out(self, bad: Bad) -> None:
        self.first_bad = self.first_bad or str(bad)
        if bad.rest:
            self.breaks_off = True
        else:
            self.lengths.append(0)

    def add(self, ids: Ids, end_of_text: int) -> None:
        end = self.n_tokens + len(ids)
        if end >= len(self.tokens):
            filled, self.tokens = self.tokens[: self.n_tokens], np.empty(2 * end + 1, TOKEN)
            self.tokens[: self.n_tokens] = filled
        self.tokens[self.n_tokens : end] = ids  # an encoder's ids are wider
        self.tokens[end] = end_of_text
        self.n_tokens = end + 1
        self.lengths.append(len(ids) + 1)


def _batches(documents: Iterator[Ids | Bad], end_of_text: int, limit: int) -> Iterator[_Batch]:
    """Cuts documents (Bad: left out) where a batch is full, and ends after `limit` that are not left out.

    It is the same batch each time: with memory that is in use already, a process takes 0.8 of the time.
    """
    batch = _Batch()
    n_documents = 0
    while n_documents < limit:
        ids = next(documents, _NO_MORE)
        if ids is _NO_MORE:
            break
        if batch.n_tokens >= _PART_TOKENS or len(batch.lengths) >= _PART_DOCUMENTS:
            yield batch
            batch.clear()
        if isinstance(ids, Bad):
            batch.leave_out(ids)
            continue
        batch.add(ids, end_of_text)
        n_documents += 1
    batch.last = True
    yield batch


_NO_MORE = np.empty(0, TOKEN)  # an object of its own, no document


def _encode(documents: Iterator[str | Bad], job: Job) -> Iterator[Ids | Bad]:
    """The ids of each document, without an end of text; Bad for one that is left out."""
    unchecked = float(_CHECKED_CHARACTERS)
    for document in documents:
        if isinstance(document, Bad):
            if not job.skip_bad:
                raise ValueError(f"{document}; --skip-bad leaves out what cannot be read")
            yield document
            continue
        ids = job.encoder(document)
        unchecked += _CHECKED * len(document)
        if len(document) <= unchecked:
            unchecked -= len(document)
            _compare(ids, document, job)
        elif unchecked >= _CHECKED_CHARACTERS:
            unchecked -= _CHECKED_CHARACTERS
            beginning = document[:_CHECKED_CHARACTERS]
            _compare(job.encoder(beginning), beginning, job)
        yield ids


def _compare(ids: Ids, text: str, job: Job) -> None:
    """Raises:
    ValueError: the ids are not those of the reference.
    """
    if job.encoder.reference is not None and not np.array_equal(ids, job.encoder.reference(text)):
        beginning = text[:60] + "..." * (len(text) > 60)
        raise ValueError(
            f"{job.encoder.name} {job.encoder.version} gives other ids than tiktoken for the document that begins "
            f"{beginning!a}; use --tokenizer tiktoken"
        )
