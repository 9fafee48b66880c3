"""Token files in the memory of a node (in_memory = true): one copy, which all workers of the node map.

The copy is a memfd, a file without a name. The kernel frees it with the last process that has it open, however that
process dies. A file in /dev/shm would outlive kill -9, and would have to fit into /dev/shm.
"""

import errno
import mmap
import os
import re
from pathlib import Path
from typing import NamedTuple

from loguru import logger
from tqdm import tqdm

_CHUNK_BYTES = 2**24
_SLOW_BYTES = 2**30  # size from which loading is logged, with a progress bar


class MemoryFile(NamedTuple):
    """Address of a memfd for all processes of the node. The inode tells it from another file at the same address."""

    pid: int
    fd: int
    inode: int


def copy_to_memory(paths: list[Path], root: Path = Path("/")) -> MemoryFile:
    """Copy files, one after the other, into a memfd. The caller closes its descriptor.

    Raises:
        ValueError: the files do not fit into the memory that is available.
    """
    folder, size_bytes = paths[0].parent, sum(path.stat().st_size for path in paths)
    if (free_bytes := available_bytes(root)) is not None and size_bytes > free_bytes:
        raise _too_small(folder, f"takes {size_bytes / 1e9:.2f} GB, but {free_bytes / 1e9:.2f} GB are available")
    if slow := size_bytes >= _SLOW_BYTES:
        logger.info(f"Loading {folder} into memory, {size_bytes / 1e9:.2f} GB")
    fd = os.memfd_create("corpus")
    bar = {"desc": "corpus", "leave": False, "disable": None if slow else True}
    try:
        with open(fd, "wb", closefd=False) as memory, tqdm.wrapattr(memory, "write", size_bytes, **bar) as copy:
            for path in paths:
                with open(path, "rb") as source:
                    while chunk := source.read(_CHUNK_BYTES):
                        copy.write(chunk)
    except OSError as error:
        os.close(fd)
        if error.errno not in (errno.ENOSPC, errno.ENOMEM):
            raise
        raise _too_small(folder, f"did not fit ({error.strerror} while it was loaded)") from None
    return MemoryFile(os.getpid(), fd, os.fstat(fd).st_ino)


def map_memory(memory: MemoryFile) -> mmap.mmap:
    """Map a memfd of any process of the node.

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


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that a process can still take: what the machine has, within the limits of the control groups around it.

    Page cache counts as available. None means that `root` does not tell, as outside of Linux.
    """
    left = [1024 * int(kb) for kb in re.findall(r"MemAvailable: +(\d+)", _text(root / "proc/meminfo"))]
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):  # version 2, or version 1
            # Inside a container the path may be the host's: then only some of the folders exist.
            group = root / "sys/fs/cgroup" / ("memory" if controllers else "") / path.lstrip("/")
            left += [n for folder in (group, *group.parents) if (n := _left_in_group(folder)) is not None]
    return min(left, default=None)


def _left_in_group(folder: Path) -> int | None:
    """Limit - usage + page cache of a control group in bytes. None means that it has no limit."""
    limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")
    usage = _text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes")
    if not (limit.isdigit() and usage.isdigit()):  # "max", or no such file
        return None
    stat = dict(re.findall(r"(\w+) (\d+)", _text(folder / "memory.stat")))
    cache = [int(stat.get(f"total_{name}", stat.get(name, 0))) for name in ("active_file", "inactive_file")]
    return max(0, int(limit) - int(usage) + sum(cache))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _too_small(folder: Path, reason: str) -> ValueError:
    return ValueError(f"in_memory = true: the corpus in {folder} {reason}; set in_memory = false")
