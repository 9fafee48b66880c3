"""The missing ranks after a failed collective: in a store every rank says that it is there, or why it ended.

The connections of a process group are of no use once one of them has failed. The store may be gone too, with rank 0.
"""

import re
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress

import torch.distributed as dist

HERE = "here"


class PeerError(RuntimeError):
    """Another worker died or did not answer in time; the message is one line."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """Return what an error says in one line: backends add where they found it, traces and advice."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+\.cc:\d+\] ", "", line).partition(". This is typically ")[0]


class Liveness:
    """Turns the errors of failed collectives into one that names the missing ranks. All ranks share the store."""

    TIMEOUT_S: float = 5  # for ranks that fail a little later, each with an error of its own

    def __init__(self, rank: int, world_size: int, store: dist.Store) -> None:
        self.step = 0  # steps done, 0 before the first one of this process
        self._rank, self._world_size, self._store = rank, world_size, store

    @contextmanager
    def report_own_error(self) -> Generator[None]:
        """Tell the other ranks of an error of the block, before anything around the block is closed."""
        try:
            yield
        except Exception as error:
            with suppress(RuntimeError):  # the store is gone
                self._store.set(_key(self._rank), HERE if _is_of_a_peer(error) else first_line(error))
            raise

    @contextmanager
    def blame_missing_ranks(self) -> Generator[None]:
        """Turn the error of a failed collective into a PeerError that names the missing ranks, or says why they ended.

        All remaining ranks come here, each with an error of its own.
        """
        try:
            with self.report_own_error():
                yield
        except Exception as error:
            if not _is_of_a_peer(error):
                raise
            when = f"after step {self.step}" if self.step else "at the start"
            if ended := self._ended():
                raise PeerError(f"{when}: {ended}") from error
            missing, reason = self._missing(), first_line(error)
            if isinstance(error, PeerError):  # names a neighbour, which may itself have waited for another rank
                raise PeerError(f"{reason}; no answer from {missing}" if missing else reason) from error
            found = f"timed out waiting for {missing}" if missing else "all are there, but a call failed"
            raise PeerError(f"{when}: {found}: {reason}") from error

    def _ended(self) -> str:
        """Return which ranks ended for a reason of their own, and why; "" if none is known."""
        answers: dict[int, str] = {}
        with suppress(RuntimeError):
            for rank in range(self._world_size):
                if self._store.check([_key(rank)]):
                    answers[rank] = self._store.get(_key(rank)).decode()
        return "; ".join(f"rank {rank} ended: {answer}" for rank, answer in answers.items() if answer != HERE)

    def _missing(self) -> str:
        """Return the ranks that do not answer within TIMEOUT_S, as "rank 3" or "ranks 3, 5"; "" if all answer."""
        deadline_s = time.monotonic() + self.TIMEOUT_S
        missing = list(range(self._world_size))
        try:
            while missing and time.monotonic() < deadline_s:
                missing = [rank for rank in missing if not self._store.check([_key(rank)])]
                time.sleep(0.02)
        except RuntimeError:
            if len(missing) == self._world_size:
                return "rank 0, and the store is gone with it"
        return f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}" if missing else ""


def _key(rank: int) -> str:
    return f"liveness/{rank}"


def _is_of_a_peer(error: Exception) -> bool:
    of_gloo = type(error) is RuntimeError and "gloo" in str(error)
    return of_gloo or isinstance(error, PeerError | dist.DistError)
