"""Processes that share the calls of a task, with a progress bar. They end with their parent, even if it is killed."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process
from typing import Any

Report = Callable[[int], None]  # takes how much of a call is done, in the unit of the progress bar


def run(
    task: Callable[..., Any],
    calls: Iterable[tuple[Any, ...]],
    state: tuple[Any, ...],
    num_proc: int,
    *,
    name: str,
    total: int,
    unit: str = "B",
) -> Generator[Any]:
    """Yield the results of task(*state, report, *call) in the order of the calls. Closing kills the processes.

    Raises:
        ValueError, OSError: the task did.
        ChildProcessError: a process died.
    """
    calls = list(calls)
    context = get_context("fork")  # the processes inherit the state: names of millions of files, the encoder
    progress = context.RawArray("q", len(calls))
    pool = ProcessPoolExecutor(min(num_proc, len(calls)), context, _start, (task, state, progress))
    try:
        futures = [pool.submit(_call, i, *call) for i, call in enumerate(calls)]
        from tqdm import tqdm  # now, for it takes a while, in which the processes work

        tqdm.monitor_interval = 0  # no thread: the next processes are forked too
        rare_s = 0.1 if sys.stderr.isatty() else 10  # in a log file each update is a line
        with tqdm(total=total, desc=name, unit=unit, unit_scale=True, delay=rare_s, mininterval=rare_s) as bar:
            for future in futures:
                while wait([future], timeout=0.1).not_done:
                    bar.update(min(sum(progress), total) - bar.n)
                yield future.result()
            bar.update(total - bar.n)
    except BrokenProcessPool:
        raise ChildProcessError("a process was killed, perhaps for want of memory") from None
    finally:
        for child in active_children():
            child.terminate()
        pool.shutdown(cancel_futures=True)


_inherited: tuple[Any, ...] = ()  # in a process: task, state and progress


def _start(*inherited: Any) -> None:
    global _inherited
    _inherited = inherited
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _call(i: int, *arguments: Any) -> Any:
    task, state, progress = _inherited

    def report(n: int) -> None:
        progress[i] = n

    return task(*state, report, *arguments)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
