"""The .bin file: GPT-2 token ids as little-endian uint16, one after the other, without a header (nanoGPT's format).

Its size is all the metadata there is, so a reader can check little; a writer makes up for it: a file that has its
final name is whole.
"""

import os
import uuid
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

TOKEN = np.dtype("<u2")  # what one token is on disk

Tokens = npt.NDArray[np.uint16]


def open_tokens(path: str | Path, min_tokens: int) -> Tokens:
    """The tokens of a file, shape (n_tokens,), read-only; mapped, so what is not looked at is not read.

    min_tokens: tokens of one window, train.context_length + 1.

    Raises:
        ValueError: the file is missing, unreadable, empty, cut inside a token, or shorter than one window.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            _check_size(path, size_bytes, min_tokens)
            tokens = np.memmap(file, dtype=TOKEN, mode="r")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; {_how_to_make(path)}") from None
    except PermissionError:
        raise ValueError(
            f"{path}: no permission to read it; its owner can give it with `chmod a+r` (folders: a+x)"
        ) from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}; {_how_to_make(path)}") from None
    return np.asarray(tokens)  # a plain array over the same mapping: np.memmap's own slicing is slow


def write_tokens(path: str | Path, documents: Iterable[npt.NDArray[np.integer]]) -> int:
    """Writes documents, each shape (n,), one after the other; returns the number of tokens in the file.

    The file appears, or replaces an older one, when all is written. An error on the way, of the iterable as well,
    leaves nothing behind.

    Raises:
        ValueError: a token id does not fit into 16 bits.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex}.bin")  # same folder: a rename there is atomic
    n_tokens = 0
    try:
        with open(temporary, "xb") as file:
            for document in documents:
                file.write(_as_tokens(path, document).tobytes())
                n_tokens += len(document)
            file.flush()
            os.fsync(file.fileno())  # or, after a power failure, the name could be there without the bytes
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return n_tokens


def has_n_tokens(path: str | Path, n_tokens: int) -> bool:
    """Whether the file is there and holds exactly n_tokens."""
    try:
        return os.stat(path).st_size == n_tokens * TOKEN.itemsize
    except FileNotFoundError:
        return False


def _check_size(path: Path, size_bytes: int, min_tokens: int) -> None:
    n_tokens, rest = divmod(size_bytes, TOKEN.itemsize)
    if size_bytes == 0:
        raise ValueError(f"{path}: is empty; remove it and {_how_to_make(path)}")
    if rest:
        raise ValueError(
            f"{path}: {size_bytes} bytes is not a whole number of 2-byte tokens, so the file was cut short; "
            f"remove it and {_how_to_make(path)}"
        )
    if n_tokens < min_tokens:
        shorter = f"set train.context_length to at most {n_tokens - 1}, or " if n_tokens > 1 else ""
        raise ValueError(
            f"{path}: holds {n_tokens} tokens, but one window of train.context_length = {min_tokens - 1} takes "
            f"{min_tokens}; {shorter}use a larger corpus"
        )


def _how_to_make(path: Path) -> str:
    """E.g. "make it with `python data/sotu/prepare.py`": the script of the folder's name, else all of them."""
    corpora = Path(__file__).parent
    names = sorted(script.parent.name for script in corpora.glob("*/prepare.py"))
    folder = path.absolute().parent
    fitting = [name for name in names if name == folder.name] or names
    out = "" if folder.parent == corpora and fitting == [folder.name] else f" --out {path.parent}"
    return "make it with " + " or ".join(f"`python data/{name}/prepare.py{out}`" for name in fitting)


def _as_tokens(path: Path, ids: npt.NDArray[np.integer]) -> Tokens:
    if ids.dtype != TOKEN and len(ids) and not 0 <= (wrong := _farthest(ids)) < 2**16:
        raise ValueError(f"{path}: token id {wrong} does not fit into 16 bits; ids from 0 to 65535 do")
    return ids.astype(TOKEN, copy=False)


def _farthest(ids: npt.NDArray[np.integer]) -> int:
    """The id that is below 0 if there is one, else the largest."""
    return int(low) if (low := ids.min()) < 0 else int(ids.max())
