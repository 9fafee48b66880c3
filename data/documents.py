"""The documents of a corpus in local files: .txt (one each), .jsonl, .jsonl.gz (one a line), .parquet (one a row).

A corpus is cut into units, which processes read independently of each other; the order of units is that of the
documents: files by name, then lines or rows. In memory are the document at hand, a block of its file, and of every file
its path as a string (a Path takes several times as much), for a corpus may be millions of .txt files.
"""

import errno
import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import orjson

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
UNIT_BYTES = 2**23  # of text: what one process takes at once; a .gz or a row group is not cut
_ROWS = 256  # of a parquet file, in memory at once


class Unit(NamedTuple):
    """Some documents that lie together: whole .txt files, or a part of one other file.

    start, stop: bytes of a .jsonl file, in which lines start; row groups of a .parquet file; None: all of it.
    n_rows: of these row groups.
    """

    paths: tuple[str, ...]
    n_bytes: int  # on disk, about
    start: int | None = None
    stop: int | None = None
    n_rows: int | None = None


class Bad(NamedTuple):
    """Stands for a document that cannot be read; rest: for all that follow in its file, whose number is unknown."""

    where: str  # file and line
    reason: str
    rest: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class Source:
    """A corpus in files.

    name: how messages and meta.json call it.
    text_key: the key of a .jsonl object, or the column of a .parquet file, that holds the text.
    """

    name: str
    files: tuple[str, ...]
    text_key: str = "text"

    def fingerprint(self) -> str:
        """Changes when a file does, by name, size or time."""
        import hashlib

        digest = hashlib.sha256(repr(self.text_key).encode())
        for path in self.files:
            stat = os.stat(path)
            digest.update(repr((path, stat.st_size, stat.st_mtime_ns)).encode())
        return digest.hexdigest()


def find_files(patterns: list[str]) -> tuple[str, ...]:
    """The files that match, sorted, each once. A pattern is a path, with *, ?, [...] and ** as in a shell.

    Raises:
        ValueError: a pattern matches nothing, or a file of another kind.
    """
    found: set[str] = set()
    for pattern in patterns:
        paths = [pattern] if Path(pattern).exists() else glob.iglob(pattern, recursive=True)
        files = {str(Path(path)) for path in paths if os.path.isfile(path)}
        if not files:
            folder = f"; it is a folder: '{pattern}/*.txt' has its texts" if Path(pattern).is_dir() else ""
            raise ValueError(f"--input {pattern}: matches no file{folder}")
        if others := sorted(path for path in files if not path.endswith(SUFFIXES)):
            raise ValueError(f"{others[0]}: is none of {', '.join(SUFFIXES)}")
        found |= files
    return tuple(sorted(found, key=lambda path: "\0".join(Path(path).parts)))  # the files of a folder are together


def plan_units(source: Source) -> list[Unit]:
    """All documents of a source, cut where processes may share them. Does not depend on their number."""
    units: list[Unit] = []
    texts: list[str] = []  # small .txt files that follow each other
    texts_bytes = 0
    for path in source.files:
        n_bytes = os.stat(path).st_size
        if texts and (not path.endswith(".txt") or texts_bytes + n_bytes > UNIT_BYTES):
            units.append(Unit(tuple(texts), texts_bytes))
            texts, texts_bytes = [], 0
        if path.endswith(".txt"):
            texts.append(path)
            texts_bytes += n_bytes
        elif path.endswith(".jsonl"):
            starts = range(0, n_bytes, UNIT_BYTES)
            units += [Unit((path,), min(UNIT_BYTES, n_bytes - a), a, min(a + UNIT_BYTES, n_bytes)) for a in starts]
        elif path.endswith(".parquet"):
            units += _plan_parquet(path, n_bytes)
        else:
            units.append(Unit((path,), n_bytes))
    return units + ([Unit(tuple(texts), texts_bytes)] if texts else [])


class UnitReader:
    """The texts of a unit, in order; Bad in the place of each that is broken, or one in that of the rest of its file.

    Iterating raises:
        OSError: a file cannot be read.
    """

    def __init__(self, unit: Unit, text_key: str) -> None:
        self.unit = unit
        self.text_key = text_key
        self.done_bytes = 0  # of unit.n_bytes, about; only of those that may be large, a .gz or a row group

    def __iter__(self) -> Iterator[str | Bad]:
        unit, text_key, first = self.unit, self.text_key, self.unit.paths[0]
        if first.endswith(".txt"):
            for path in unit.paths:
                yield _decode(Path(path).read_bytes(), path)
        elif first.endswith(".parquet"):
            for n, text in enumerate(_read_parquet(first, unit, text_key), 1):
                self.done_bytes = unit.n_bytes * n // max(n, unit.n_rows or n)
                if isinstance(text, Bad) and text.rest and unit.n_rows is not None:
                    yield from repeat(text._replace(rest=False), unit.n_rows - n + 1)
                else:
                    yield text
        elif first.endswith(".gz"):
            with open(first, "rb") as compressed, gzip.open(compressed, "rb") as file:
                for text in _read_lines(file, first, 1, None, text_key):
                    self.done_bytes = compressed.tell()
                    yield text
        else:
            with open(first, "rb") as file:
                start = _next_line(file, unit.start or 0)
                yield from _read_lines(file, first, start, unit.stop, text_key)


def _decode(data: bytes, where: str) -> str | Bad:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return Bad(where, f"is not UTF-8 (byte {error.start})")


def _next_line(file: IO[bytes], start: int) -> int:
    """Goes to the first line that starts at `start` or later, and returns where that is."""
    if start > 0:
        file.seek(start - 1)
        file.readline()  # a line that starts before belongs to the unit before
    return file.tell()


def _read_lines(
    file: IO[bytes] | gzip.GzipFile, name: str, start: int, stop: int | None, text_key: str
) -> Iterator[str | Bad]:
    """The texts of the lines that start before `stop`; None: of all lines, and `start` is the first one's number."""
    position = start if stop is not None else 0
    n_lines = 0
    lines = iter(file)
    while stop is None or position < stop:
        try:
            line = next(lines, None)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            yield Bad(f"{name}, near line {n_lines + 1}", f"the compressed file is broken ({error})", rest=True)
            return
        if line is None:
            return
        if not line.isspace():
            text = _text_of(line, text_key)
            if isinstance(text, str):
                yield text
            else:
                number = n_lines + 1 if stop is None else _line_number(name, position)
                yield Bad(f"{name}, line {number}", text.reason)
        n_lines += 1
        position += len(line)


def _text_of(line: bytes, text_key: str) -> str | Bad:
    try:
        value = _parse(line)
    except ValueError as error:  # of UTF-8 too
        return Bad("", f"is no JSON ({error})")
    except RecursionError:
        return Bad("", "is no JSON that can be read (too deeply nested)")
    if not isinstance(value, dict):
        return Bad("", f'is no JSON object with a key "{text_key}"')
    if text_key not in value:
        names = [key for key in value if isinstance(value[key], str)]
        return Bad("", f'has no key "{text_key}"; {_choice(names)}')
    text = value[text_key]
    return text if isinstance(text, str) else Bad("", f'"{text_key}" is no text but {json.dumps(text)[:40]}')


def _parse(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:  # perhaps of what json takes: NaN, half a surrogate pair, a byte order mark
        return json.loads(line)


def _line_number(name: str, position: int) -> int:
    """Of the line that starts at a byte; reads all before it."""
    n_lines = 1
    with open(name, "rb") as file:
        while position > 0 and (block := file.read(min(position, 2**20))):
            n_lines += block.count(b"\n")
            position -= len(block)
    return n_lines


def _plan_parquet(path: str, n_bytes: int) -> list[Unit]:
    """Row groups that follow each other, as many as make up a unit."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            sizes, rows = [group.total_byte_size for group in groups], [group.num_rows for group in groups]
    except (pa.ArrowException, OSError) as error:
        _raise_if_of_the_moment(error, path)
        return [Unit((path,), n_bytes)]  # who reads it will say what is wrong
    units: list[Unit] = []
    start = taken = 0
    for i, size in enumerate(sizes):
        taken += size
        if taken >= UNIT_BYTES or i + 1 == len(sizes):
            share = max(1, n_bytes * taken // max(1, sum(sizes)))
            units.append(Unit((path,), share, start, i + 1, sum(rows[start : i + 1])))
            start, taken = i + 1, 0
    return units


def _read_parquet(path: str, unit: Unit, text_key: str) -> Iterator[str | Bad]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        # A buffer: else a whole column of a row group is read.
        with pq.ParquetFile(path, buffer_size=2**20, page_checksum_verification=True) as file:
            kinds = {field.name: field.type for field in file.schema_arrow}
            names = [name for name, kind in kinds.items() if _holds_text(kind)]
            if text_key not in names:
                found = f"holds no text but {kinds[text_key]} in its column" if text_key in kinds else "has no column"
                yield Bad(path, f'{found} "{text_key}"; {_choice(names)}', rest=True)
                return
            groups = list(range(unit.start or 0, file.metadata.num_row_groups if unit.stop is None else unit.stop))
            row = sum(file.metadata.row_group(i).num_rows for i in range(unit.start or 0))
            for batch in file.iter_batches(_ROWS, groups, [text_key], use_threads=False):
                for text in _texts_or_bytes(batch.column(0)):
                    row += 1
                    if isinstance(text, bytes):
                        text = _decode(text, f"{path}, row {row}")
                    yield text if text is not None else Bad(f"{path}, row {row}", f'"{text_key}" is null')
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        _raise_if_of_the_moment(error, path)
        yield Bad(f"{path}, after row {row}" if row else path, f"is a broken parquet file ({_line(error)})", rest=True)


def _texts_or_bytes(column: "pa.Array[Any]") -> "list[str | bytes | None]":
    """The rows as texts; where one of them is not UTF-8, all as bytes, so that the others are not lost with it."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):  # as pandas writes categories
        column = column.dictionary_decode()
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return column.cast(pa.large_binary()).to_pylist()


def _raise_if_of_the_moment(error: Exception, path: str) -> None:
    """Raises an error that says nothing about the bytes of a file, but that they cannot be had now.

    Called broken, the file would have other units, and other documents, than when the run goes on.
    """
    number = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
    if number is not None:
        raise OSError(number, os.strerror(number), path) from None


def _holds_text(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _choice(names: list[str]) -> str:
    """Of the keys or columns that hold text."""
    listed = ", ".join(f'"{name}"' for name in names[:20])
    return f"text is in {listed}: choose one with --text-key" if names else "no other holds text"


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
