"""Who is left when a collective has failed: in the store every worker says that it is there, or why it ended.

The connections of a process group are of no use when one of them has failed. The store may be gone too, with rank 0.
"""

import time
from contextlib import suppress
from typing import Any

HERE = "here"


class RollCall:
    """The roll of one worker. store: the torch.distributed.Store of all."""

    TIMEOUT_S: float = 5  # for workers that fail a little later, each with an error of its own

    def __init__(self, rank: int, world_size: int, store: Any) -> None:
        self._rank, self._world_size, self._store = rank, world_size, store

    def answer(self, answer: str = HERE) -> None:
        with suppress(RuntimeError):  # there is nobody to write it down
            self._store.set(_key(self._rank), answer)

    def ended(self) -> str:
        """The workers that ended for a reason of their own, and why; "": nobody that is known of."""
        answers: dict[int, str] = {}
        with suppress(RuntimeError):
            for rank in range(self._world_size):
                if self._store.check([_key(rank)]):
                    answers[rank] = self._store.get(_key(rank)).decode()
        return "; ".join(f"rank {rank} ended: {answer}" for rank, answer in answers.items() if answer != HERE)

    def missing(self) -> str:
        """Who does not answer within TIMEOUT_S: "rank 3" or "ranks 3, 5"; "": nobody."""
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
    return f"roll_call/{rank}"
