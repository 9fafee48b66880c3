"""How bench.py measures: interleaved blocks of several arms, ratios within a round, memory that a block allocates."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

Result = dict[str, float | str]  # one line of a table
Arms = dict[str, Callable[[], object]]  # a block of each arm


def alternate(
    arms: Arms,
    rounds: int,
    *,
    before: Callable[[], object] | None = None,
    now_s: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds of each block, by arm. Each round runs every arm once; a first round is not counted."""
    import torch

    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times_s: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(rounds + 1):
        for name, block in arms.items():
            if before is not None:
                before()
            synchronize()
            start_s = now_s()
            block()
            synchronize()
            if i > 0:
                times_s[name].append(now_s() - start_s)
    return times_s


def compare(times_s: dict[str, list[float]], *, base: str, per: int = 1) -> list[Result]:
    """Return one line for each arm: ms of one of the `per` steps in a block, and its ratio to the base arm."""
    return [
        {
            "arm": name,
            "median ms": round(statistics.median(times) * 1e3 / per, 3),
            "fastest ms": round(min(times) * 1e3 / per, 3),
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


def repeat(function: Callable[[], object], n: int) -> None:
    for _ in range(n):
        function()


def peak_temporary_bytes(block: Callable[[], object]) -> int:
    """Return the most memory that `block` holds at once beyond what was allocated before, new state included.

    On the CPU it comes from the profiler's record of every allocation and release of torch's allocator.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before_bytes = torch.cuda.memory_allocated()
        block()
        return torch.cuda.max_memory_allocated() - before_bytes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        block()
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
