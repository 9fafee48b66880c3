"""data/node_memory.py: the memory that is left, by fake and by real files; memory after kill -9."""

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.node_memory import MemoryFile, available_bytes, copy_to_memory, map_memory

GB = 10**9
ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="memfd_create and /proc are Linux's")


def fake(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\nShmem: 1 kB\n"}  # 8.192 GB
V2 = MEMINFO | {"proc/self/cgroup": "0::/slurm/job_7/step_0\n"}
V1 = MEMINFO | {"proc/self/cgroup": "5:cpu,memory:/slurm/job_7\n4:cpuset:/slurm\n0::/\n"}


def v2(folder: str, limit: int | str, used: int, cache: int = 0) -> dict[str, str]:
    path, half = f"sys/fs/cgroup/{folder}", cache // 2
    stat = f"anon 5\ninactive_file {half}\nactive_file {cache - half}\nfile 99999\n"
    return {f"{path}/memory.max": f"{limit}\n", f"{path}/memory.current": f"{used}\n", f"{path}/memory.stat": stat}


def v1(folder: str, limit: int, used: int, cache: int = 0) -> dict[str, str]:
    path = f"sys/fs/cgroup/memory/{folder}/memory"
    stat = f"inactive_file 5\nactive_file 7\ntotal_inactive_file {cache}\ntotal_active_file 0\n"
    return {f"{path}.limit_in_bytes": f"{limit}\n", f"{path}.usage_in_bytes": f"{used}\n", f"{path}.stat": stat}


JOB, STEP = "slurm/job_7", "slurm/job_7/step_0"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, None, id="nothing to read"),
        pytest.param(MEMINFO, 8_192_000_000, id="no groups"),
        pytest.param(V2, 8_192_000_000, id="group without a controller"),
        pytest.param(V2 | v2(STEP, "max", 5 * GB), 8_192_000_000, id="no limit"),
        pytest.param(V2 | v2(STEP, 6 * GB, 5 * GB, 3 * GB), 4 * GB, id="limit and page cache"),
        pytest.param(V2 | v2(STEP, "max", GB) | v2(JOB, 4 * GB, GB), 3 * GB, id="limit of the job"),
        pytest.param(V2 | v2("", 2 * GB, GB), GB, id="container: the path is the host's"),
        pytest.param(V2 | v2("", GB, 2 * GB), 0, id="over the limit"),
        pytest.param(V1 | v1(JOB, 6 * GB, 5 * GB, GB) | v1("", 2**63 - 4096, 1), 2 * GB, id="version 1"),
    ],
)
def test_available_is_the_least_of_all_limits(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    assert available_bytes(fake(tmp_path, files)) == expected


@linux
def test_a_corpus_larger_than_the_memory_is_refused(tmp_path: Path) -> None:
    root = fake(tmp_path, V2 | v2("", 3000, 1000))
    paths = [tmp_path / "train.bin", tmp_path / "val.bin"]
    for path, size in zip(paths, (1900, 100), strict=True):
        path.write_bytes(bytes(size))
    os.close(copy_to_memory(paths, root).fd)
    paths[1].write_bytes(bytes(101))
    message = rf"the corpus in {tmp_path} takes 0.00 GB, but 0.00 GB are available; set in_memory = false$"
    with pytest.raises(ValueError, match="^in_memory = true: " + message):
        copy_to_memory(paths, root)


@linux
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOMEM])
def test_memory_may_end_while_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    (tmp_path / "train.bin").write_bytes(bytes(100))
    n_open = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr("data.node_memory.tqdm.update", full)
    with pytest.raises(ValueError, match=r"^in_memory = true: the corpus in .* did not fit .*; set in_memory = false$"):
        copy_to_memory([tmp_path / "train.bin"])
    assert len(os.listdir("/proc/self/fd")) == n_open


@linux
@pytest.mark.fault
def test_the_last_process_frees_the_memory_after_kill_9(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"token ids")
    loader = start("print(*copy_to_memory([Path(sys.argv[1])]), flush=True); input()", tmp_path / "train.bin")
    memory = MemoryFile(*map(int, answer(loader).split()))
    reads = "mapped = map_memory(MemoryFile(*map(int, sys.argv[1:]))); "
    other = start(reads + "print('mapped', flush=True); input(); print(mapped[:], flush=True); input()", *memory)
    assert answer(other) == "mapped\n"
    assert holders(memory.inode) == {loader.pid, other.pid}
    loader.kill()
    loader.communicate()
    assert holders(memory.inode) == {other.pid}
    assert answer(other, "read\n") == "b'token ids'\n"
    other.kill()
    other.communicate()
    assert holders(memory.inode) == set()
    for wrong in (memory, MemoryFile(os.getpid(), 0, -1)):
        with pytest.raises(ValueError, match=r"^in_memory = true: .* cannot be opened .* set in_memory = false"):
            map_memory(wrong)


def start(program: str, *arguments: object) -> "subprocess.Popen[str]":
    imports = "import sys; from pathlib import Path; from data.node_memory import *; "
    command = [sys.executable, "-c", imports + program, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answer(process: "subprocess.Popen[str]", question: str = "") -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(question)
    process.stdin.flush()
    return process.stdout.readline()


def holders(inode: int) -> set[int]:
    """Processes that have a memory file open, as a mapping does too."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            files = [fd for fd in (process / "fd").iterdir() if "/memfd:corpus" in os.readlink(fd)]
            found |= {int(process.name) for fd in files if fd.stat().st_ino == inode}
    return found
