"""The files of a checkpoint: which there are, writing one worker's, reading and checking them. No process groups."""

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from decent.liveness import first_line

State = dict[str, Any]  # what torch.load(weights_only=True) can read: tensors, numbers, strings, lists, dicts

FORMAT = 2  # of the files; another number is refused
INDEX = "index.json"


class DamagedCheckpoint(ValueError):
    """A file of a checkpoint is missing, or is not what was written."""


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint, as its index tells of it."""

    path: Path
    step: int  # optimizer steps done
    about: dict[str, Any]  # of the run
    workers: list[dict[str, Any]]  # "bytes" and "sha256" of each worker's file


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{9}", path.name) and path.is_dir())


def checkpoints_at(path: Path) -> list[Path]:
    """The checkpoint `path`, or those of that folder or run directory, oldest first.

    Raises:
        ValueError: there is none.
    """
    found = [path] if (path / INDEX).exists() else list_checkpoints(path) or list_checkpoints(path / "checkpoint")
    if not found:
        raise ValueError(f'checkpoint = "{path}": there is no checkpoint, as log/RUN/checkpoint/step-000001000')
    return found


def read_index(path: Path) -> Saved:
    """
    Raises:
        DamagedCheckpoint: it is missing or not what was written.
    """
    try:
        index = json.loads((path / INDEX).read_text())
        if index["format"] != FORMAT:
            raise DamagedCheckpoint(f"{path / INDEX}: has format {index['format']}, this program reads {FORMAT}")
        if index.pop("sha256") != _digest(index):
            raise DamagedCheckpoint(f"{path / INDEX}: its SHA-256 is not that of what was written")
        return Saved(path, index["step"], index["about"], index["workers"])
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path / INDEX}: cannot be read: {error}") from None


def read_worker(saved: Saved, rank: int) -> State:
    """The state that worker `rank` saved, on the CPU. No code in the file is run.

    Raises:
        DamagedCheckpoint: the file is missing, of another size or content than was written, or holds other objects.
    """
    path, expected = saved.path / _worker_file(rank), saved.workers[rank]
    try:
        if (found := path.stat().st_size) != expected["bytes"]:
            raise DamagedCheckpoint(f"{path}: has {found} bytes, {expected['bytes']} were written")
        if _sha256(path) != expected["sha256"]:
            raise DamagedCheckpoint(f"{path}: its SHA-256 is not that of what was written")
        return torch.load(path, map_location="cpu", weights_only=True)
    except DamagedCheckpoint:
        raise
    except pickle.UnpicklingError:  # torch's message tells how to load it all the same
        raise DamagedCheckpoint(
            f"{path}: holds more than tensors and numbers, which could run code: not loaded"
        ) from None
    except Exception as error:  # a file made to do harm fails in ways of its own
        raise DamagedCheckpoint(f"{path}: cannot be read: {first_line(error)}") from None


def read_mean(saved: Saved) -> State:
    """The elementwise mean over the workers of all floating-point tensors; what else there is, of worker 0.

    Raises:
        DamagedCheckpoint: as read_worker.
    """
    n = len(saved.workers)
    state = read_worker(saved, 0)
    sums = [t.double() if t.is_floating_point() else t for t in tensors_of(state)]
    for rank in range(1, n):
        for total, t in zip(sums, tensors_of(read_worker(saved, rank)), strict=True):
            if total.is_floating_point():
                total += t
    means = iter(sums)
    return map_tensors(state, lambda t: (next(means) / n).to(t.dtype) if t.is_floating_point() else next(means))


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested dicts, lists and tuples with function(t) for each tensor t, in their order."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(value, function) for value in tree)
    return tree


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """All tensors, in the order of map_tensors."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors_of(value)


def write_worker(folder: Path, rank: int, state: State) -> dict[str, Any]:
    """
    Raises:
        OSError, RuntimeError: the file cannot be written.
        ValueError: a parameter is not finite; an older checkpoint is of more use than this one.
    """
    if not all(torch.isfinite(t).all() for t in state.get("model", {}).values()):
        raise ValueError("a parameter is nan or infinite")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _worker_file(rank)
    with synced(path) as file:
        torch.save(state, file)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def require_files(folder: Path, workers: list[dict[str, Any]]) -> None:
    """
    Raises:
        OSError: this worker does not see what the others have written.
    """
    for rank, worker in enumerate(workers):
        path = folder / _worker_file(rank)
        if not path.exists() or path.stat().st_size != worker["bytes"]:
            raise OSError(f"{path} is not there as rank {rank} wrote it: log_dir must be a folder that all nodes share")


def _worker_file(rank: int) -> str:
    return f"worker-{rank:05d}.pt"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def write_index(folder: Path, step: int, about: dict[str, Any], workers: list[dict[str, Any]]) -> None:
    index: dict[str, Any] = {"format": FORMAT, "step": step, "about": about, "workers": workers}
    with synced(folder / INDEX) as file:
        file.write(json.dumps({**index, "sha256": _digest(index)}, indent=1).encode())
    sync_names(folder)


def _digest(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


@contextmanager
def synced(path: Path) -> Generator[IO[bytes]]:
    """A file to write, on the disk at the end: or a power failure could leave the name without the bytes."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sync_names(folder: Path) -> None:
    """Waits until the disk holds the names in a folder, so that they outlive a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every network file system can do this
            os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Under its name a checkpoint is complete, also while it is removed."""
    hidden = path.with_name(f".old-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Generator[IO[bytes]]:
    """Binary file that takes its name when the block ends, written and synced; an exception leaves nothing behind."""
    hidden = path.with_name(f".{path.name}.tmp")
    try:
        with synced(hidden) as file:
            yield file
        hidden.replace(path)
    finally:
        with suppress(OSError):
            hidden.unlink(missing_ok=True)
