"""in_memory: token files in the memory of a node, where all of its workers read the same pages.

The memory is a file without a name in any file system. It is freed with the last process that has it open, however
that dies, and /dev/shm with its own limit has no part in it.
"""

import errno
import mmap
import os
import time
from pathlib import Path
from typing import BinaryIO, NamedTuple

from loguru import logger
from tqdm import tqdm

_CHUNK_BYTES = 2**24
_TELL_BYTES = 2**30  # a file below this is loaded before anyone wonders


class MemoryFile(NamedTuple):
    """A file in memory, as other processes of the machine find it."""

    pid: int
    fd: int
    inode: int


def require_memory(paths: list[Path], root: Path = Path("/")) -> None:
    """
    Raises:
        ValueError: the files together are larger than the memory that this process may still take.
    """
    size_bytes = sum(path.stat().st_size for path in paths)
    free_bytes = available_bytes(root)
    if free_bytes is not None and size_bytes > free_bytes:
        raise _too_small(paths[0].parent, f"takes {_gb(size_bytes)}, but {_gb(free_bytes)} are available")


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that a process can still take: what the machine has, and what each limit around the process leaves.

    Page cache counts as available. None: there is nothing to read it from under `root`, as outside of Linux.
    """
    machine = _numbers(root / "proc/meminfo").get("MemAvailable:")
    groups = [_left_in_group(folder) for folder in _memory_groups(root)]
    return min((n for n in [machine and machine * 1024, *groups] if n is not None), default=None)


def copy_to_memory(path: Path) -> MemoryFile:
    """The file's bytes in memory; the caller closes the descriptor, which other processes open through /proc.

    Raises:
        ValueError: the memory does not suffice after all.
    """
    fd = os.memfd_create(path.name)
    try:
        with open(path, "rb") as source, open(fd, "wb", closefd=False) as memory:
            _copy(source, memory, path)
    except OSError as error:
        os.close(fd)
        if error.errno not in (errno.ENOSPC, errno.ENOMEM):
            raise
        raise _too_small(path.parent, f"did not fit ({error.strerror} while {path.name} was loaded)") from None
    return MemoryFile(os.getpid(), fd, os.fstat(fd).st_ino)


def map_memory(memory: MemoryFile) -> mmap.mmap:
    """
    Raises:
        ValueError: it cannot be opened from here.
    """
    path = f"/proc/{memory.pid}/fd/{memory.fd}"
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_ino != memory.inode:
                raise OSError("it is another file")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ValueError(
            f"in_memory = true: the memory of local rank 0 cannot be opened at {path} ({error}); "
            "set in_memory = false, or run the node's workers in one container under one user"
        ) from None


def _copy(source: BinaryIO, memory: BinaryIO, path: Path) -> None:
    size_bytes = os.fstat(source.fileno()).st_size
    start_s = time.perf_counter()
    if tell := size_bytes >= _TELL_BYTES:
        logger.info(f"Loading {path}, {_gb(size_bytes)}, into memory")
    bar = tqdm(total=size_bytes, desc=path.name, unit="B", unit_scale=True, leave=False, disable=None if tell else True)
    with bar:
        while chunk := source.read(_CHUNK_BYTES):
            memory.write(chunk)
            bar.update(len(chunk))
    if tell:
        logger.info(f"Loaded {path} in {time.perf_counter() - start_s:.1f} s")


def _memory_groups(root: Path) -> list[Path]:
    """Folders of the process's memory control group and of those around it, version 2 and version 1.

    Inside a container the path may be the host's: then only some of the folders exist.
    """
    folders: list[Path] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
            parts = Path(path).parts[1:]
            folders += [mount.joinpath(*parts[:n]) for n in range(len(parts) + 1)]
    return folders


def _left_in_group(folder: Path) -> int | None:
    """Limit - usage + page cache in bytes; None without a limit."""
    stat = _numbers(folder / "memory.stat")
    for limit_name, usage_name, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        limit, usage = _text(folder / limit_name).strip(), _text(folder / usage_name).strip()
        if limit.isdigit() and usage.isdigit():  # not "max"
            cache = stat.get(f"{prefix}active_file", 0) + stat.get(f"{prefix}inactive_file", 0)
            return max(0, int(limit) - int(usage) + cache)
    return None


def _numbers(path: Path) -> dict[str, int]:
    """Of lines such as "MemAvailable:  8000 kB"."""
    lines = [line.split() for line in _text(path).splitlines()]
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _too_small(corpus: Path, what: str) -> ValueError:
    return ValueError(f"in_memory = true: the corpus in {corpus} {what}; set in_memory = false")


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB"
