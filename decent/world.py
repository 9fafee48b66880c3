"""The ranks of a run: this process's own, and what all of them decide together. The only reader of os.environ."""

import ctypes
import os
import socket
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from decent.liveness import Liveness, PeerError, first_line

T = TypeVar("T")


class SetupError(ValueError):
    """A user's mistake, raised on all ranks; the message is one line."""

    exit_code = 2


class _Mistake(NamedTuple):
    """An error in place of a rank's value."""

    message: str
    where: str


def group_timeout(timeout_s: float | None, device: torch.device) -> timedelta | None:
    """How long members of a process group wait for each other; None means PyTorch's default.

    NCCL ends the process then. So it waits longer than StopRequest, which says first who is missing.
    """
    return None if timeout_s is None else timedelta(seconds=timeout_s + (60 if device.type == "cuda" else 0))


@dataclass(frozen=True)
class World:
    rank: int
    world_size: int
    local_rank: int  # rank among the workers of this node
    local_world_size: int
    device: torch.device  # a GPU for this worker alone, or the CPU
    n_gpus: int = 0  # GPUs of this node
    job_id: str | None = None  # SLURM's, which survives a requeue
    restart_count: int = 0  # restarts of this run by SLURM and torchrun
    max_restarts: int = 0  # torchrun's option
    store_stays: bool = False  # torchrun keeps its store when it restarts the workers

    @classmethod
    def from_env(cls) -> "World":
        """Read what torchrun put into the environment; a plain `python train.py` is a world of one."""
        env = os.environ
        local_rank = int(env.get("LOCAL_RANK", "0"))
        local_world_size = int(env.get("LOCAL_WORLD_SIZE", "1"))
        # Ask torch, not CUDA_VISIBLE_DEVICES, which SLURM sets on machines without a GPU too.
        n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return cls(
            rank=int(env.get("RANK", "0")),
            world_size=int(env.get("WORLD_SIZE", "1")),
            local_rank=local_rank,
            local_world_size=local_world_size,
            device=torch.device("cuda", local_rank) if n_gpus >= local_world_size else torch.device("cpu"),
            n_gpus=n_gpus,
            job_id=env.get("SLURM_JOB_ID"),
            restart_count=int(env.get("SLURM_RESTART_COUNT", "0")) + int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
            max_restarts=int(env.get("TORCHELASTIC_MAX_RESTARTS", "0")),
            store_stays=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )

    def require_gpus(self) -> None:
        """Raise a ValueError on a node that has GPUs, but not one for each of its workers."""
        if 0 < self.n_gpus < self.local_world_size:
            raise ValueError(
                f"{self.local_world_size} workers on a node with {self.n_gpus} GPUs: "
                f"start it with --nproc_per_node={self.n_gpus}, or hide the GPUs with CUDA_VISIBLE_DEVICES=''"
            )

    @contextmanager
    def connected(self, timeout_s: float | None = None) -> Generator[Liveness]:
        """Hold a process group while the block runs, NCCL's on GPUs and gloo's on CPUs.

        timeout_s is how long its members wait for each other; None means PyTorch's default.

        Raises:
            SetupError: torchrun's options would let restarted workers of two nodes wait for each other for ever.
            PeerError: a rank is missing, at the start or in a collective of the block.
        """
        if self.max_restarts and self.store_stays and self.local_world_size < self.world_size:
            raise SetupError(
                f"--max-restarts={self.max_restarts} on more than one node needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "
                "in the environment of torchrun"
            )
        timeout = group_timeout(timeout_s, self.device)
        # A world of one needs no rendezvous, and then neither ports nor host names can be in its way.
        store = dist.HashStore() if self.world_size == 1 else self._rendezvous(timeout)
        options: dict[str, Any] = {"backend": "gloo"}
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            options = {"backend": "nccl", "device_id": self.device}
        liveness = Liveness(self.rank, self.world_size, store)
        with liveness.blame_missing_ranks():
            dist.init_process_group(timeout=timeout, store=store, rank=self.rank, world_size=self.world_size, **options)
        try:
            with liveness.blame_missing_ranks():
                yield liveness
        finally:
            dist.destroy_process_group()

    def _rendezvous(self, timeout: timedelta | None) -> dist.Store:
        """Return the store in which the ranks find each other."""
        options = {} if timeout is None else {"timeout": timeout}
        try:
            store, _, _ = next(rendezvous("env://", self.rank, self.world_size, **options))
        except dist.DistError as error:
            raise PeerError(f"at the start: the {self.world_size} workers did not meet: {first_line(error)}") from error
        # A store that stays holds the addresses of the dead workers. Otherwise no prefix: the torchruns of several
        # nodes count their restarts separately.
        return dist.PrefixStore(f"restart_{self.restart_count}", store) if self.store_stays else store

    def all_gather(self, value: T) -> list[T]:
        """Return every rank's value, by rank. A collective; a rank with an error calls `agree_on_errors` instead.

        Raises:
            SetupError: a rank has an error. The message names it, unless all ranks have the same error.
        """
        values = [value] * self.world_size
        dist.all_gather_object(values, value)
        if mistakes := [value for value in values if isinstance(value, _Mistake)]:
            message, where = mistakes[0]
            everywhere = [mistake.message for mistake in mistakes] == [message] * self.world_size
            raise SetupError(message if everywhere else f"{where}: {message}")
        return values

    def agree_on_errors(self, error: str | None) -> None:
        """Raise one rank's error as a SetupError on all ranks, if there is one. A collective."""
        self.all_gather(None if error is None else _Mistake(error, f"rank {self.rank} on {socket.gethostname()}"))

    @contextmanager
    def raise_on_all_ranks(self) -> Generator[None]:
        """Make a SetupError on all ranks of a ValueError or OSError in one rank's block: no rank is left waiting.

        A rank that fails answers the others' next collective, which must be `all_gather` or made of it.
        """
        error = None
        try:
            yield
        except SetupError:  # from a collective of the block: all ranks have it
            raise
        except (ValueError, OSError) as raised:
            error = str(raised)
        self.agree_on_errors(error)

    def once_per_node(self, make: Callable[[], T] | None) -> T:
        """Return what `make` returns on local rank 0 of this node; the other ranks pass None. A collective.

        `make` may take longer than ranks wait for each other: meanwhile they ask whether it is done.
        """
        thread = ThreadPoolExecutor(max_workers=1)
        made = thread.submit(make) if make is not None else None
        thread.shutdown(wait=False)  # ends it when `make` is done
        pause_s = 0.001
        while not all(self.all_gather(made is None or made.done())):
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.5)
        return self.all_gather(cast(T, made.result() if made else None))[self.rank - self.local_rank]

    def rows(self, n: int) -> slice:
        """This rank's rows of the n rows of a global batch; n is a multiple of the world size."""
        return slice(self.rank * n // self.world_size, (self.rank + 1) * n // self.world_size)

    def mean(self, values: Tensor) -> Tensor:
        """Elementwise mean over the ranks. A collective."""
        total = values.clone()
        dist.all_reduce(total)
        return total / self.world_size

    def synchronize(self) -> None:
        """Wait until the device has finished its queued work, so that clocks can be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def keep_freed_memory() -> None:
    """Make glibc keep the memory that is freed: mapping the logits again in every step takes two thirds of a small
    model's step on a CPU."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # other C libraries have none
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(option, value)
