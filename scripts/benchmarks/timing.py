"""Frame of the benchmarks: interleaved blocks of arms, ratios within a round, the table, memory, gloo workers."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.profiler import ProfilerActivity, profile

Result = dict[str, float | str]  # one line of a table
Arms = dict[str, Callable[[], object]]  # what is measured, by name


def alternate(
    arms: Arms,
    rounds: int,
    *,
    per_block: int = 1,
    before: Callable[[], object] | None = None,
    now_s: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return by arm the seconds of a call in each block of `per_block` calls.

    Each round runs a block of every arm; a first round is not counted.
    """
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times_s: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(rounds + 1):
        for name, call in arms.items():
            if before is not None:
                before()
            synchronize()
            start_s = now_s()
            for _ in range(per_block):
                call()
            synchronize()
            if i > 0:
                times_s[name].append((now_s() - start_s) / per_block)
    return times_s


def compare(times_s: dict[str, list[float]], *, base: str) -> list[Result]:
    """Return one line for each arm: ms of a call, and its ratio to the base arm."""
    return [
        {
            "arm": name,
            "median ms": round(statistics.median(times) * 1e3, 3),
            "fastest ms": round(min(times) * 1e3, 3),
            f"x {base.split(', ')[-1]}": round(median_ratio(times, times_s[base]), 3),
        }
        for name, times in times_s.items()
    ]


def median_ratio(times: list[float], others: list[float]) -> float:
    """Return the median over rounds of the ratio within a round."""
    return statistics.median(t / other for t, other in zip(times, others, strict=True))


def print_table(results: list[Result]) -> None:
    columns = list(dict.fromkeys(column for row in results for column in row))
    lines = [columns, *([str(row.get(column, "")) for column in columns] for row in results)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells[1:]]))


def peak_temporary_bytes(call: Callable[[], object]) -> int:
    """Return the most memory that `call` holds at once beyond what was allocated before, new state included.

    On the CPU it comes from the profiler's record of every allocation and release of torch's allocator.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before_bytes = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before_bytes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held_bytes = peak_bytes = 0
    for _, change_bytes in changes:
        held_bytes += change_bytes
        peak_bytes = max(peak_bytes, held_bytes)
    return peak_bytes


def pss_bytes(pid: int | str) -> int:
    """Return the proportional set size of a process, or of "self". It is 0 if the process has ended.

    A page that n processes share counts 1/n in each of them.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def run_in_workers(work: Callable[..., Any], n_workers: int, *args: Any) -> Any:
    """Call work(*args) in n gloo workers of one process group. Return rank 0's result, by way of JSON."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_worker, (n_workers, Path(folder), work, args), nprocs=n_workers)
        return json.loads((Path(folder) / "result.json").read_text())


def _worker(rank: int, n_workers: int, folder: Path, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    store = dist.FileStore(str(folder / "store"), n_workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n_workers)
    result = work(*args)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()
