"""A prepared corpus: train.bin, val.bin and meta.json in one folder.

A .bin file holds GPT-2 token ids as little-endian uint16, one after the other, without a header (nanoGPT's format).
Every file is whole once it has its final name. meta.json describes both; a folder that nanoGPT made has none.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ValidationError

TOKEN = np.dtype("<u2")  # one token on disk
META = "meta.json"

Tokens = npt.NDArray[np.uint16]


class SplitMeta(BaseModel, frozen=True, extra="forbid", strict=True):
    documents: int
    tokens: int
    sha256: str  # hash of the .bin file


class Meta(BaseModel, frozen=True, extra="forbid", strict=True):
    """Description of a corpus. source is for people; source_fingerprint changes when the documents do."""

    tokenizer: str
    vocab_size: int
    encoded_by: str
    source: str
    source_fingerprint: str
    documents_left_out: int
    train: SplitMeta
    val: SplitMeta
    left_out: str = ""  # number of skipped documents and the first reason, in words
    val_fraction: float | None = 0.0005  # older files do not say it; None means chosen by the number of tokens

    @property
    def lacks_documents(self) -> bool:
        return bool(self.documents_left_out or self.left_out)

    def describe(self) -> str:
        """Return e.g. "corpus: texts/*.txt, 9,035,582,489 tokens (gpt2) in 8,009,762 documents to train on, ..."."""
        train, val = self.train, self.val
        return (
            f"corpus: {self.source}, {train.tokens:,} tokens ({self.tokenizer}) in {train.documents:,} documents "
            f"to train on, {val.tokens:,} in {val.documents:,} to validate"
        )


def list_datasets(root: Path) -> list[str]:
    """Names of the folders under `root` that hold a corpus or prepare one, sorted."""
    marks = ("prepare.py", META, "train.bin")
    return sorted({path.parent.name for mark in marks for path in root.glob(f"*/{mark}")})


def read_meta(data_dir: str | Path) -> Meta | None:
    """Return what data_dir/meta.json says. None means that it is absent, or in a folder without permission.

    Raises:
        ValueError: the file cannot be read, or is not one of ours.
    """
    path = Path(data_dir) / META
    if not os.path.exists(path):
        return None
    try:
        fields = json.loads(path.read_text("utf-8"))
        # A source may name files that are not UTF-8: halves of surrogate pairs, which pydantic refuses.
        return Meta.model_validate_json(json.dumps(fields, ensure_ascii=False).encode(errors="replace"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise ValueError(f"{path}: does not describe a corpus ({reason}); prepare the corpus again, or remove this file")


def check_meta(meta: Meta, data_dir: str | Path, vocab_size: int) -> None:
    """Check that a model with vocab_size embeddings can train on the corpus, and that the files are as described.

    Raises:
        ValueError: the vocabulary is too small, or a file has another size.
    """
    path = Path(data_dir) / META
    if vocab_size < meta.vocab_size:
        raise ValueError(
            f"model.vocab_size = {vocab_size} is below the {meta.vocab_size} tokens of {meta.tokenizer}, in which "
            f"{path} says the corpus is written; set it to at least {meta.vocab_size}"
        )
    for name, split in (("train", meta.train), ("val", meta.val)):
        file = Path(data_dir) / f"{name}.bin"
        if file.exists() and not has_n_tokens(file, split.tokens):
            raise ValueError(
                f"{file}: holds {file.stat().st_size / TOKEN.itemsize:.10g} tokens, but {path} says {split.tokens}; "
                f"prepare the corpus again, or remove {META} if the file is right"
            )


def write_meta(folder: Path, meta: Meta) -> None:
    with new_file(folder / META) as file:
        file.write(meta.model_dump_json(indent=2).encode() + b"\n")


def open_tokens(path: str | Path, n_least: int) -> Tokens:
    """Return the tokens of a file, shape (n_tokens,), read-only; mapped, so only what is touched is read.

    n_least: tokens of one window, train.context_length + 1.

    Raises:
        ValueError: the file is missing, unreadable, empty, cut inside a token, or shorter than one window.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            n_tokens, rest = divmod(os.fstat(file.fileno()).st_size, TOKEN.itemsize)
            if rest or not n_tokens:
                raise ValueError(f"{path}: is empty or cut inside a 2-byte token; remove it and {_how_to_make(path)}")
            tokens = np.asarray(np.memmap(file, TOKEN, "r"))  # np.memmap's own slicing is slow
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; {_how_to_make(path)}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    if n_tokens < n_least:
        shorter = f"set train.context_length to at most {n_tokens - 1}, or " if n_tokens > 1 else ""
        raise ValueError(
            f"{path}: holds {n_tokens} tokens, but one window of train.context_length = {n_least - 1} takes "
            f"{n_least}; {shorter}use a larger corpus"
        )
    return tokens


def has_n_tokens(path: str | Path, n_tokens: int) -> bool:
    """Return whether the file is there and holds exactly n_tokens."""
    try:
        return os.stat(path).st_size == n_tokens * TOKEN.itemsize
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """File to write to, which gets its name, or replaces an older one, when it is whole and on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")  # same folder: a rename there is atomic
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or, after a power failure, the name could be there without the bytes
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_and_hash(folder: Path) -> dict[str, str]:
    """Wait until train.bin and val.bin are on the disk, and return their SHA-256 by split."""
    files = [folder / "train.bin", folder / "val.bin"]
    with ThreadPoolExecutor() as threads:  # both release the interpreter, and a disk writes while we hash
        synced, hashes = threads.map(_sync, files), threads.map(file_sha256, files)
        return {path.stem: sha256 for path, sha256, _ in zip(files, hashes, synced, strict=True)}


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _how_to_make(path: Path) -> str:
    """Return e.g. "make it with `python data/sotu/prepare.py`": the script of the folder's name, else all of them."""
    scripts = {script.parent.name: script.parent for script in sorted(Path(__file__).parent.glob("*/prepare.py"))}
    folder = path.absolute().parent
    names = [folder.name] if folder.name in scripts else scripts
    out = "" if folder in scripts.values() else f" --out {path.parent}"
    return "make it with " + " or ".join(f"`python data/{name}/prepare.py{out}`" for name in names)
