"""Runs a task in forked processes: they inherit what it needs, and end with the process that started them."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def run_in_processes(
    task: Callable[[Item], Iterable[Answer]], items: Iterable[Item], num_proc: int
) -> Generator[Answer]:
    """Yields what task(item) yields, for each item, as it comes; with num_proc = 1, in this process.

    An item is taken when a process is free for it. Closing the iterator, also by leaving it, kills the processes.

    Raises:
        ValueError, OSError: the task did.
        ChildProcessError: a process died.
    """
    if num_proc <= 1:
        for item in items:
            yield from task(item)
        return
    context = multiprocessing.get_context("fork")
    children: dict[Connection, Any] = {}
    try:
        for _ in range(num_proc):
            ours, theirs = context.Pipe()
            child = context.Process(target=_serve, args=(theirs, [ours, *children], task), daemon=True)
            child.start()
            theirs.close()
            children[ours] = child
        yield from _dispatch(children, iter(items))
    finally:
        for child in children.values():
            child.terminate()
        for child in children.values():
            child.join()


def _dispatch(children: dict[Connection, Any], items: Iterator[Any]) -> Generator[Any]:
    busy: set[Connection] = set()
    for connection in children:
        _give_next(connection, items, busy)
    while busy:
        for connection in wait(list(busy)):
            assert isinstance(connection, Connection)
            try:
                kind, value = connection.recv()
            except (EOFError, ConnectionResetError):
                children[connection].join()
                code = children[connection].exitcode
                raise ChildProcessError(f"a process ended with exit code {code}, perhaps for want of memory") from None
            if kind == "error":
                raise value
            if kind == "answer":
                yield value
            else:
                _give_next(connection, items, busy)


def _give_next(connection: Connection, items: Iterator[Any], busy: set[Connection]) -> None:
    try:
        item = next(items)
    except StopIteration:
        busy.discard(connection)
        return
    busy.add(connection)
    # One that died meanwhile is noticed when it is asked for its answer.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.send(item)


def _serve(connection: Connection, others: list[Connection], task: Callable[[Any], Iterable[Any]]) -> None:
    """Answers item after item, until the parent closes its end or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which then ends this process
    for other in others:
        other.close()  # or the ends of a parent that was killed would stay open here, and nobody would notice
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            item = connection.recv()
            try:
                for answer in task(item):
                    connection.send(("answer", answer))
            except (ValueError, OSError) as error:
                connection.send(("error", error))
            else:
                connection.send(("done", None))
