"""Files of a checkpoint: list, write, check and read them. No process groups."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from decent.liveness import first_line

State = dict[str, Any]  # what torch.load(weights_only=True) can read: tensors, numbers, strings, lists, dicts

FORMAT = 2  # version of the files; any other is refused
INDEX, WORKER = "index.json", "worker-{:05d}.pt"


class DamagedCheckpoint(ValueError):
    """A file of a checkpoint is missing, differs from what was written, or holds more than a State."""


@dataclass(frozen=True)
class Saved:
    """Contents of a checkpoint's index."""

    path: Path  # of the checkpoint
    step: int  # optimizer steps done
    about: dict[str, Any]  # backend, optimizer and model of the run
    workers: list[dict[str, Any]]  # "bytes" and "sha256" of each worker's file


def list_checkpoints(path: Path) -> list[Path]:
    """Checkpoints at a path, oldest first. The path is a checkpoint, a folder of them, or a run directory."""
    name = "step-" + 9 * "[0-9]"
    return [path] if (path / INDEX).exists() else sorted(path.glob(name)) or sorted(path.glob(f"checkpoint/{name}"))


def read_index(path: Path) -> Saved:
    """Read the index of the checkpoint `path`. Raises DamagedCheckpoint."""
    try:
        index = json.loads((path / INDEX).read_text())
        if index["format"] != FORMAT:
            reason = f"has format {index['format']}, this program reads {FORMAT}"
        elif index.pop("sha256") != _digest(index):
            reason = "its SHA-256 is not that of what was written"
        else:
            return Saved(path, index["step"], index["about"], index["workers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"cannot be read: {error}"
    raise DamagedCheckpoint(f"{path / INDEX}: {reason}")


def read_worker(saved: Saved, rank: int) -> State:
    """State that worker `rank` saved, on the CPU. No code in the file is run. Raises DamagedCheckpoint."""
    path = saved.path / WORKER.format(rank)
    try:
        if _sha256(path) == saved.workers[rank]["sha256"]:
            return torch.load(path, map_location="cpu", weights_only=True)
        reason = "its SHA-256 is not that of what was written"
    except pickle.UnpicklingError:  # torch's message tells how to load it all the same
        reason = "holds more than tensors and numbers, which could run code: not loaded"
    except Exception as error:  # a hostile file fails in ways of its own
        reason = f"cannot be read: {first_line(error)}"
    raise DamagedCheckpoint(f"{path}: {reason}")


def read_mean(saved: Saved) -> State:
    """Mean over the workers of every floating-point tensor; all else is worker 0's. One worker is read at a time."""
    n = 1 if saved.about["backend"] == "pytorchddp" else len(saved.workers)  # All-Reduce: only worker 0 saves a model
    first = read_worker(saved, 0)
    total = map_tensors(lambda t: t.double() if t.is_floating_point() else t, first)
    for rank in range(1, n):
        total = map_tensors(lambda x, t: x + t if t.is_floating_point() else x, total, read_worker(saved, rank))
    return map_tensors(lambda x, t: (x / n).to(t.dtype) if t.is_floating_point() else x, total, first)


def map_tensors(function: Callable[..., Tensor], tree: Any, *others: Any) -> Any:
    """Copy of nested dicts, lists and tuples, with function(t, t of the other trees) in place of each tensor t."""
    if isinstance(tree, Tensor):
        return function(tree, *others)
    if isinstance(tree, dict):
        return {key: map_tensors(function, value, *(o[key] for o in others)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(function, *values) for values in zip(tree, *others, strict=True))
    return tree


@contextmanager
def whole_file(path: Path) -> Generator[IO[bytes]]:
    """Binary file that takes its name when the block ends, written and synced; an exception leaves nothing behind."""
    hidden = path.with_name(f".{path.name}.tmp")
    try:
        with open(hidden, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power failure could leave the name without the bytes
        hidden.replace(path)
    finally:
        with suppress(OSError):
            hidden.unlink(missing_ok=True)


def write_worker(folder: Path, rank: int, state: State) -> dict[str, Any]:
    """Write one worker's file and return its size and SHA-256.

    Raises:
        OSError, RuntimeError: the file cannot be written.
        ValueError: a parameter is not finite; an older checkpoint is of more use than this one.
    """
    if not all(torch.isfinite(t).all() for t in state.get("model", {}).values()):
        raise ValueError("a parameter is nan or infinite")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / WORKER.format(rank)
    with whole_file(path) as file:
        torch.save(state, file)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def publish(hidden: Path, step: int, about: dict[str, Any], workers: list[dict[str, Any]]) -> Path:
    """Complete the checkpoint in `hidden` with its index and give it its name, which is returned.

    Raises:
        OSError: the file system fails, or this worker does not see what the others have written.
    """
    for rank, worker in enumerate(workers):
        part = hidden / WORKER.format(rank)
        if not part.exists() or part.stat().st_size != worker["bytes"]:
            raise OSError(f"{part} is not there as rank {rank} wrote it: log_dir must be a folder that all nodes share")
    index: dict[str, Any] = {"format": FORMAT, "step": step, "about": about, "workers": workers}
    with whole_file(hidden / INDEX) as file:
        file.write(json.dumps({**index, "sha256": _digest(index)}, indent=1).encode())
    _sync_names(hidden)
    path = hidden.with_name(f"step-{step:09d}")
    if path.exists():  # damaged, or the run would have started from it or a later one
        remove(path)
    hidden.rename(path)
    _sync_names(path.parent)  # before older ones go
    return path


def remove(path: Path) -> None:
    """Remove a checkpoint. It loses its name first, so that a folder with a name is complete at any time."""
    hidden = path.with_name(f".old-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what interrupted saves and removals have left in a folder of checkpoints."""
    for leftover in folder.glob(".*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _sync_names(folder: Path) -> None:
    """Wait until the disk holds the names in a folder, so that they outlive a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # not every network file system can do this
        os.fsync(fd)
    os.close(fd)
