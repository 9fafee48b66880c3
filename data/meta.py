"""meta.json: what a data folder holds, beside train.bin and val.bin. Folders made by others need not have one."""

import dataclasses
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.token_file import TOKEN

NAME = "meta.json"


@dataclass(frozen=True)
class SplitMeta:
    documents: int
    tokens: int
    sha256: str  # of the file


@dataclass(frozen=True)
class Meta:
    """One corpus. source: where the documents are from, for people; source_fingerprint: changes when they do.

    documents_left_out: those that are known to be; left_out says in words which, and names files that break off.
    """

    tokenizer: str
    vocab_size: int
    encoded_by: str
    source: str
    source_fingerprint: str
    documents_left_out: int
    train: SplitMeta
    val: SplitMeta
    left_out: str = ""  # also in files from before there was such a line

    @property
    def lacks_documents(self) -> bool:
        return bool(self.documents_left_out or self.left_out)

    def describe(self) -> str:
        """E.g. "corpus: texts/*.txt, 9,035,582,489 tokens (gpt2) in 8,009,762 documents to train on, ..."."""
        train, val = self.train, self.val
        return (
            f"corpus: {self.source}, {train.tokens:,} tokens ({self.tokenizer}) in {train.documents:,} documents "
            f"to train on, {val.tokens:,} in {val.documents:,} to validate"
        )


def list_datasets(root: Path) -> list[str]:
    """Names of the folders under `root` that hold a corpus or prepare one, sorted."""
    marks = ("prepare.py", NAME, "train.bin")
    return sorted({path.parent.name for mark in marks for path in root.glob(f"*/{mark}")})


def read_meta(data_dir: str | Path) -> Meta | None:
    """What data_dir/meta.json says; None if there is none, or the whole folder is closed: open_tokens says that.

    Raises:
        ValueError: it is not one of ours.
    """
    path = Path(data_dir) / NAME
    try:
        path.stat()
    except OSError:
        return None
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    try:
        fields: dict[str, Any] = json.loads(text)
        train, val = (SplitMeta(**fields.pop(name)) for name in ("train", "val"))
        meta = Meta(**fields, train=train, val=val)
        for record in (meta, train, val):
            _check_types(record)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path}: is no description of a corpus ({error}); prepare the corpus again, or remove this file"
        ) from None
    return meta


def _check_types(record: Meta | SplitMeta) -> None:
    for field in dataclasses.fields(record):
        if type(value := getattr(record, field.name)) is not field.type:
            raise TypeError(f"{field.name} is {value!r:.40}")


def check_meta(meta: Meta, data_dir: str | Path, vocab_size: int) -> None:
    """Whether a model with vocab_size embeddings can train on it, and the files are those that were described.

    Raises:
        ValueError: no.
    """
    path = Path(data_dir) / NAME
    if vocab_size < meta.vocab_size:
        raise ValueError(
            f"model.vocab_size = {vocab_size} is below the {meta.vocab_size} tokens of {meta.tokenizer}, in which "
            f"{path} says the corpus is written; set it to at least {meta.vocab_size}"
        )
    for name, split in (("train", meta.train), ("val", meta.val)):
        file = Path(data_dir) / f"{name}.bin"
        if file.exists() and file.stat().st_size != split.tokens * TOKEN.itemsize:
            raise ValueError(
                f"{file}: holds {file.stat().st_size / TOKEN.itemsize:.10g} tokens, but {path} says {split.tokens}; "
                f"prepare the corpus again, or remove {NAME} if the file is right"
            )


def write_meta(path: Path, meta: Meta) -> None:
    """The file appears, or replaces an older one, when it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(meta), indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sync_and_hash(folder: Path) -> dict[str, str]:
    """SHA-256 of train.bin and val.bin in a folder, which are on the disk itself when this returns."""
    files = [folder / "train.bin", folder / "val.bin"]
    with ThreadPoolExecutor() as threads:  # both release the interpreter, and a disk writes while we hash
        done = threads.map(_sync, files)
        hashes = threads.map(file_sha256, files)
        return {path.stem: found for path, found, _ in zip(files, hashes, done, strict=True)}


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
