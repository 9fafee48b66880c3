"""Text to GPT-2's ids at full speed, for whole corpora: gigatoken, or tiktoken where that is not installed.

tiktoken defines which ids are right. gigatoken gives the same many times faster, but knows a later Unicode: letters and
numbers that Unicode 17 added are still signs to tiktoken. Documents that hold one go to tiktoken.
"""

import importlib.metadata
import re
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import tiktoken

from data.tokenizer import gpt2_encoding, ranks_file

EncoderName = Literal["gigatoken", "tiktoken"]
Ids = npt.NDArray[np.integer]

# Letters and numbers to gigatoken that are none to tiktoken, in hexadecimal, both ends included: for these versions.
# tests/test_data_encoders.py finds them by trying every code point, and fails where it finds others.
VERSIONS = {"gigatoken": "0.10.0", "tiktoken": "0.14.0"}
NEW_LETTERS = (
    "88f-88f c5c-c5c cdc-cdc a7ce-a7cf a7d2-a7d2 a7d4-a7d4 a7f1-a7f1 10940-10959 10ec5-10ec7 11db0-11ddb 11de0-11de9 "
    "16ea0-16eb8 16ebb-16ed3 16ff2-16ff6 187f8-187ff 18d09-18d1e 18d80-18df2 1e6c0-1e6de 1e6e0-1e6e2 1e6e4-1e6e5 "
    "1e6e7-1e6ed 1e6f0-1e6f4 1e6fe-1e6ff 2b73a-2b73f 2cea2-2cead 323b0-33479"
)

# What \s is to tiktoken; Python's own counts four control characters more.
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_RUN = re.compile(f"[{_SPACE}]{{64,}}")
_LONG = 500_000  # characters; from a million spaces on, tiktoken's regular expression overflows its stack


class Encoder(Protocol):
    """Turns a text, in which nothing is special, into its ids, shape (n,), without an end of text."""

    name: EncoderName
    version: str
    vocab_size: int
    end_of_text: int
    reference: "Tiktoken | None"  # what it must agree with

    def __call__(self, text: str) -> Ids: ...


def best_encoder() -> EncoderName:
    """gigatoken where the versions are installed whose differences are known."""
    return "gigatoken" if _installed() == VERSIONS else "tiktoken"


def build_encoder(name: EncoderName) -> Encoder:
    """An encoder that children of a fork can use.

    Raises:
        ValueError: it is not installed, in another version than in VERSIONS, or GPT-2's merges cannot be had.
    """
    encoder = Gigatoken() if name == "gigatoken" else Tiktoken()
    if encoder.vocab_size > 2**16:
        raise ValueError(f"{name}: a vocabulary of {encoder.vocab_size} tokens does not fit into 16 bits")
    return encoder


class Tiktoken:
    """The reference: encode_ordinary of tiktoken, without its list of Python numbers."""

    name: EncoderName = "tiktoken"
    version = tiktoken.__version__

    def __init__(self) -> None:
        self.encoding = gpt2_encoding()
        self.vocab_size = self.encoding.n_vocab
        self.end_of_text = self.encoding.eot_token
        self.reference: Tiktoken | None = None

    def __call__(self, text: str) -> Ids:
        if len(text) >= _LONG and (cuts := _cuts(text)):
            parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
            return np.concatenate([self._encode(part) for part in parts])
        return self._encode(text)

    def _encode(self, text: str) -> Ids:
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # half a surrogate pair: encode_ordinary replaces it by U+FFFD
            return np.array(self.encoding.encode_ordinary(text), dtype=np.uint32)


def _cuts(text: str) -> list[int]:
    """Where GPT-2's pattern cuts in any case: before the last character of a long run of spaces that ends in a word."""
    runs = [match.span() for match in _RUN.finditer(text)]
    return [end - 1 for start, end in runs if end - start >= _LONG and end < len(text)]


class Gigatoken:
    """gigatoken, except for the documents on which it would differ from the reference."""

    name: EncoderName = "gigatoken"

    def __init__(self) -> None:
        if (installed := _installed()) != VERSIONS:
            wanted, found = (
                " and ".join(f"{package} {version}" for package, version in versions.items())
                for versions in (VERSIONS, installed)
            )
            raise ValueError(f"--tokenizer gigatoken: needs {wanted}, found {found}; or use --tokenizer tiktoken")
        from gigatoken.gigatoken_rs import BPETokenizer

        self.version = VERSIONS["gigatoken"]
        self.tiktoken = Tiktoken()
        self.vocab_size = self.tiktoken.vocab_size
        self.end_of_text = self.tiktoken.end_of_text
        self.reference: Tiktoken | None = self.tiktoken
        # Without special tokens: the end-of-text marker in a document is ordinary text, as to encode_ordinary.
        self.backend = BPETokenizer.from_tiktoken(ranks_file(), "gpt2", {})
        self.new_letter = re.compile("[" + "".join(f"{first}-{last}" for first, last in new_letters()) + "]")
        # Their first two bytes, for a search that is fast where they are rare: each pattern starts with a fixed byte.
        # The same two begin 4,096 characters in a row (64, of three bytes), so each range has those of its ends, and no
        # others.
        beginnings = {end.encode("utf-8")[:2] for pair in new_letters() for end in pair}
        self.beginnings = [
            re.compile(
                b"\\x%02x[%s]" % (first, b"".join(b"\\x%02x" % pair[1] for pair in beginnings if pair[0] == first))
            )
            for first in sorted({pair[0] for pair in beginnings})
        ]

    def __call__(self, text: str) -> Ids:
        if text.isascii():
            return self.backend.encode(text)  # without a copy
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError:
            return self.tiktoken(text)
        if any(two.search(data) for two in self.beginnings) and self.new_letter.search(text):
            return self.tiktoken(text)
        return self.backend.encode(data)


def new_letters() -> list[tuple[str, str]]:
    """The ranges of NEW_LETTERS: their first and last characters."""
    pairs = [pair.split("-") for pair in NEW_LETTERS.split()]
    return [(chr(int(first, 16)), chr(int(last, 16))) for first, last in pairs]


def _installed() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for package in VERSIONS:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions
