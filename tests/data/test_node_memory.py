"""data/node_memory.py: what memory is left, by fake and by real files; memory that nobody holds any more."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data.node_memory import MemoryFile, available_bytes, copy_to_memory, map_memory, require_memory

GB = 10**9
linux = pytest.mark.skipif(sys.platform != "linux", reason="memfd_create and /proc are Linux's")


def fake(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\nShmem: 1 kB\n"}  # 8.192 GB
V2 = MEMINFO | {"proc/self/cgroup": "0::/slurm/job_7/step_0\n"}
V1 = MEMINFO | {"proc/self/cgroup": "5:cpu,memory:/slurm/job_7\n4:cpuset:/slurm\n0::/\n"}


def v2_group(folder: str, limit: str, used: int, cache: int = 0) -> dict[str, str]:
    path = f"sys/fs/cgroup/{folder}"
    stat = f"anon 5\ninactive_file {cache // 2}\nactive_file {cache - cache // 2}\nfile 99999\n"
    return {f"{path}/memory.max": f"{limit}\n", f"{path}/memory.current": f"{used}\n", f"{path}/memory.stat": stat}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, None, id="nothing to read"),
        pytest.param(MEMINFO, 8_192_000_000, id="no groups"),
        pytest.param(V2, 8_192_000_000, id="group without a controller"),
        pytest.param(V2 | v2_group("slurm/job_7/step_0", "max", 5 * GB), 8_192_000_000, id="no limit"),
        pytest.param(V2 | v2_group("slurm/job_7/step_0", str(6 * GB), 5 * GB), GB, id="limit"),
        pytest.param(V2 | v2_group("slurm/job_7/step_0", str(6 * GB), 5 * GB, 3 * GB), 4 * GB, id="page cache"),
        pytest.param(
            V2 | v2_group("slurm/job_7/step_0", "max", GB) | v2_group("slurm/job_7", str(4 * GB), GB),
            3 * GB,
            id="limit of the job around the step",
        ),
        pytest.param(V2 | v2_group("", str(2 * GB), GB), GB, id="container: the path is the host's"),
        pytest.param(V2 | v2_group("", str(GB), 2 * GB), 0, id="over the limit"),
        pytest.param(
            V1
            | {
                "sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes": f"{6 * GB}\n",
                "sys/fs/cgroup/memory/slurm/job_7/memory.usage_in_bytes": f"{5 * GB}\n",
                "sys/fs/cgroup/memory/slurm/job_7/memory.stat": "active_file 7\ntotal_inactive_file 500000000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
            },
            1_500_000_000,
            id="version 1",
        ),
    ],
)
def test_available_is_the_least_of_the_machine_and_all_limits(
    tmp_path: Path, files: dict[str, str], expected: int | None
) -> None:
    assert available_bytes(fake(tmp_path, files)) == expected


@linux
def test_this_machine_has_memory() -> None:
    available = available_bytes()
    assert available is not None
    assert 2**20 < available < 2**50


def test_a_corpus_larger_than_the_memory_is_refused_with_both_numbers_and_a_way_out(tmp_path: Path) -> None:
    root = fake(tmp_path, V2 | v2_group("", "3000", 1000))
    paths = [tmp_path / "train.bin", tmp_path / "val.bin"]
    for path, size in zip(paths, (1900, 100), strict=True):
        path.write_bytes(bytes(size))
    require_memory(paths, root)
    paths[1].write_bytes(bytes(101))
    message = (
        rf"^in_memory = true: the corpus in {tmp_path} takes 0.00 GB, but 0.00 GB are available; set in_memory = false$"
    )
    with pytest.raises(ValueError, match=message):
        require_memory(paths, root)


@linux
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOMEM])
def test_memory_that_ends_while_loading_is_the_same_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    (tmp_path / "train.bin").write_bytes(bytes(100))
    monkeypatch.setattr("data.node_memory._copy", full)
    n_open = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match=r"^in_memory = true: the corpus in .* did not fit .*; set in_memory = false$"):
        copy_to_memory(tmp_path / "train.bin")
    assert len(os.listdir("/proc/self/fd")) == n_open


@linux
@pytest.mark.fault
def test_after_kill_9_nobody_holds_the_memory(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(bytes(10**6))
    command = "import sys; from pathlib import Path; from data.node_memory import *; "
    loads = command + "print(*(memory := copy_to_memory(Path(sys.argv[1]))), flush=True); mapped = map_memory(memory); "
    maps = command + "mapped = map_memory(MemoryFile(*map(int, sys.argv[1:]))); print('mapped', flush=True); "
    loader = start(loads, tmp_path / "train.bin")
    memory = MemoryFile(*map(int, answer(loader).split()))
    other = start(maps, *memory)
    assert answer(other) == "mapped\n"
    assert holders(memory.inode) == {loader.pid, other.pid}
    loader.send_signal(signal.SIGKILL)
    loader.wait()
    assert holders(memory.inode) == {other.pid}  # it still can read
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert holders(memory.inode) == set()
    with pytest.raises(ValueError, match="set in_memory = false"):
        map_memory(memory)
    for process in (loader, other):
        process.communicate()


def start(program: str, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", program + "input()", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def answer(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def holders(inode: int) -> set[int]:
    """Processes that map a memory file, or have it open."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            mapped = f" {inode} " in "".join(
                line for line in (process / "maps").read_text().splitlines(True) if "/memfd:train.bin" in line
            )
            opened = any(
                "/memfd:train.bin" in os.readlink(fd) and fd.stat().st_ino == inode for fd in (process / "fd").iterdir()
            )
        except OSError:  # it has ended, or is another user's
            continue
        if mapped or opened:
            found.add(int(process.name))
    return found
