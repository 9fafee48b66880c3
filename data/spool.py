"""The spool of a preparation: tokens of documents in source order, in parts that are whole or absent.

A part holds the next documents of one unit (data/documents.py). Its file is a header, then uint32 lengths of the
documents, their tokens, and why the first that is left out is. The name says unit and number, so a part need not be
opened to know its place, and the folder says of which job it is (data/pipeline.py): what outlives a killed run cannot
write among the parts of another.
"""

import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.token_file import TOKEN, Tokens

_HEADER = np.dtype("<i8")
_N_HEADER = 8  # numbers: _FORMAT, n_documents, n_bad, last, n_tokens, checksum, breaks_off, bytes of first_bad
_HEADER_BYTES = _N_HEADER * _HEADER.itemsize
_FORMAT = 0x3130_6C6F_6F70_73
_LENGTH = np.dtype("<u4")


class Part(NamedTuple):
    """What the header of a part says. last: the unit ends with it."""

    path: Path
    n_documents: int
    n_bad: int  # documents left out, not in n_documents
    last: bool
    n_tokens: int
    checksum: int  # crc32 of lengths, tokens and first_bad
    breaks_off: bool = False  # the file of the unit does, behind the documents of this part
    first_bad: str = ""  # what is wrong with the first that is left out, or where the file breaks off

    @property
    def unit(self) -> int:
        return int(self.path.name.split("-")[0])

    @property
    def n_read(self) -> int:
        """Documents of the unit that are in it or left out."""
        return self.n_documents + self.n_bad

    @property
    def tokens_offset(self) -> int:
        """The byte of the file at which the tokens start."""
        return _HEADER_BYTES + self.n_read * _LENGTH.itemsize


def part_path(folder: Path, unit: int, number: int) -> Path:
    return folder / f"{unit:07}-{number:05}.part"


def write_part(
    path: Path, lengths: npt.NDArray[np.uint32], tokens: Tokens, *, last: bool, breaks_off: bool, first_bad: str
) -> Part:
    """The part appears when all is written. lengths: as read_lengths gives them, of which tokens has sum(lengths)."""
    lengths = lengths.astype(_LENGTH, copy=False)
    checksum = _checksum(lengths, tokens, first_bad)
    n_documents = int(np.count_nonzero(lengths))
    n_bad = len(lengths) - n_documents
    reason = np.frombuffer(_encoded(first_bad), np.uint8)
    numbers = [_FORMAT, n_documents, n_bad, last, len(tokens), checksum, breaks_off, len(reason)]
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            for array in (np.array(numbers, dtype=_HEADER), lengths, tokens, reason):
                file.write(array.data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return Part(path, n_documents, n_bad, last, len(tokens), checksum, breaks_off, first_bad)


def read_part(path: Path) -> Part | None:
    """None: absent, or not written by write_part."""
    if not path.exists() or (size_bytes := path.stat().st_size) < _HEADER_BYTES:
        return None
    form, n_documents, n_bad, last, n_tokens, checksum, breaks_off, n_reason = np.fromfile(
        path, _HEADER, _N_HEADER
    ).tolist()
    part = Part(path, n_documents, n_bad, bool(last), n_tokens, checksum, bool(breaks_off))
    end = part.tokens_offset + n_tokens * TOKEN.itemsize
    if form != _FORMAT or size_bytes != end + n_reason:
        return None
    return part._replace(first_bad=np.fromfile(path, np.uint8, offset=end).tobytes().decode(errors="replace"))


def read_lengths(part: Part) -> npt.NDArray[np.uint32]:
    """Tokens of each document, shape (part.n_read,); none: it is left out."""
    return np.fromfile(part.path, _LENGTH, part.n_read, offset=_HEADER_BYTES)


def intact_tokens(part: Part) -> Tokens | None:
    """The tokens of all its documents, shape (n_tokens,).

    None: the bytes are not those that were written; a power failure can leave a name without them.
    """
    tokens = np.fromfile(part.path, TOKEN, part.n_tokens, offset=part.tokens_offset)
    return tokens if _checksum(read_lengths(part), tokens, part.first_bad) == part.checksum else None


def _checksum(lengths: npt.NDArray[np.uint32], tokens: Tokens, first_bad: str) -> int:
    return zlib.crc32(_encoded(first_bad), zlib.crc32(tokens.data, zlib.crc32(lengths.data)))


def _encoded(text: str) -> bytes:
    return text.encode(errors="backslashreplace")  # the name of a file need not be UTF-8
