"""Where this process stands among the workers, and what they decide together. The only reader of os.environ."""

import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from decent.liveness import Liveness, PeerError, first_line

T = TypeVar("T")


class SetupError(ValueError):
    """A user's mistake that every worker knows of by now; the message is one line."""


def group_timeout(timeout_s: float | None, device: torch.device) -> timedelta | None:
    """How long members of a process group wait for each other; None is PyTorch's default.

    NCCL ends the process then, so it waits longer than StopRequest, which says first who is missing.
    """
    return None if timeout_s is None else timedelta(seconds=timeout_s + (60 if device.type == "cuda" else 0))


@dataclass(frozen=True)
class World:
    rank: int
    world_size: int
    local_rank: int  # among the workers of this node
    local_world_size: int
    device: torch.device  # a GPU of its own for each worker of the node, or the CPU
    n_gpus: int = 0  # of this node
    job_id: str | None = None  # SLURM's; it survives a requeue
    restart_count: int = 0  # how often SLURM or torchrun has started this run again
    max_restarts: int = 0  # of torchrun
    store_stays: bool = False  # torchrun's store is the same after a restart

    @classmethod
    def from_env(cls) -> "World":
        """What torchrun put into the environment; a plain `python train.py` is a world of one."""
        env = os.environ
        local_rank = int(env.get("LOCAL_RANK", "0"))
        local_world_size = int(env.get("LOCAL_WORLD_SIZE", "1"))
        # Ask torch, not CUDA_VISIBLE_DEVICES: SLURM sets that one on machines without a GPU too.
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

    def require_that_restarts_meet(self) -> None:
        """For before the workers meet: two torchruns that restart them a moment apart would wait for each other.

        Raises:
            ValueError: restarted workers would look for each other in the stores of different restarts.
        """
        if self.max_restarts and self.store_stays and self.local_world_size < self.world_size:
            raise ValueError(
                f"--max-restarts={self.max_restarts} on more than one node needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "
                "in the environment of torchrun"
            )

    def require_gpus(self) -> None:
        """
        Raises:
            ValueError: there are GPUs, but not one for each worker of this node.
        """
        if 0 < self.n_gpus < self.local_world_size:
            raise ValueError(
                f"{self.local_world_size} workers on a node with {self.n_gpus} GPUs: "
                f"start it with --nproc_per_node={self.n_gpus}, or hide the GPUs with CUDA_VISIBLE_DEVICES=''"
            )

    @contextmanager
    def connected(self, timeout_s: float | None = None) -> Generator[Liveness]:
        """The process group, nccl on GPUs and gloo on CPUs, for as long as the block runs.

        timeout_s: how long its members wait for each other; None is PyTorch's default.

        Raises:
            PeerError: another worker does not come, or a collective of the block has failed since one is missing.
        """
        timeout = group_timeout(timeout_s, self.device)
        # A world of one needs no rendezvous, and then neither ports nor host names can be in its way.
        store = dist.HashStore() if self.world_size == 1 else self._rendezvous(timeout)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            backend, device_id = "nccl", self.device
        else:
            backend, device_id = "gloo", None
        liveness = Liveness(self.rank, self.world_size, store)
        with liveness.blame_missing_ranks():
            dist.init_process_group(
                backend, timeout=timeout, store=store, rank=self.rank, world_size=self.world_size, device_id=device_id
            )
        try:
            with liveness.blame_missing_ranks():
                yield liveness
        finally:
            dist.destroy_process_group()

    def _rendezvous(self, timeout: timedelta | None) -> dist.Store:
        """torchrun's store. One that stays still holds the addresses of the workers that died: hence the prefix."""
        options = {} if timeout is None else {"timeout": timeout}
        try:
            store, _, _ = next(rendezvous("env://", self.rank, self.world_size, **options))
        except dist.DistError as error:
            raise PeerError(f"at the start: the {self.world_size} workers did not meet: {first_line(error)}") from error
        # Only where it is needed, for the torchruns of several nodes count their restarts each for itself.
        return dist.PrefixStore(f"restart_{self.restart_count}", store) if self.store_stays else store

    def gather(self, value: T, error: str | None = None) -> list[T]:
        """Every worker's value, by rank. A collective.

        Raises:
            SetupError: on all workers, when one or more brought an error instead.
        """
        answers: list[tuple[T, str | None, str]] = [(value, error, "")] * self.world_size
        dist.all_gather_object(answers, (value, error, socket.gethostname()))
        errors = {rank: error for rank, (_, error, _) in enumerate(answers) if error is not None}
        if errors:
            rank, message = next(iter(errors.items()))
            everywhere = len(errors) == self.world_size and len(set(errors.values())) == 1
            raise SetupError(message if everywhere else f"rank {rank} on {answers[rank][2]}: {message}")
        return [value for value, _, _ in answers]

    def all_gather(self, value: T) -> list[T]:
        """Every worker's value, by rank. A collective."""
        return self.gather(value)

    def agree_on_errors(self, error: str | None) -> None:
        """Raise a SetupError on all workers if one or more have an error. A collective."""
        self.gather(None, error)

    @contextmanager
    def raise_on_all_ranks(self) -> Generator[None]:
        """A block in which a ValueError or OSError of one worker becomes a SetupError of all: none is left waiting.

        Collectives inside the block must be `gather` or made of it: a worker that fails answers the others' next one.
        """
        try:
            yield
        except SetupError:  # came out of a gather: all have it
            raise
        except (ValueError, OSError) as error:
            self.gather(None, error=str(error))
        else:
            self.gather(None)

    def once_per_node(self, make: Callable[[], T] | None) -> T:
        """What `make` returns on local rank 0 of this node; the others pass None. A collective of all workers.

        It may take longer than workers wait for each other: meanwhile they ask whether it is done.
        """
        thread = ThreadPoolExecutor(max_workers=1)
        try:
            made = thread.submit(make) if make is not None else None
            pause_s = 0.001
            while not all(self.gather(made is None or made.done())):
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 0.5)
            return self.gather(cast(T, made.result() if made else None))[self.rank - self.local_rank]
        finally:
            thread.shutdown(wait=False)

    def rows(self, n: int) -> slice:
        """This worker's of the n rows of a global batch; n is a multiple of the world size."""
        size = n // self.world_size
        return slice(self.rank * size, (self.rank + 1) * size)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the workers, elementwise. A collective."""
        total = values.clone()
        dist.all_reduce(total)
        return total / self.world_size

    def synchronize(self) -> None:
        """Waits until the device has done what it was given, so that clocks can be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class StopRequest:
    """SIGTERM or SIGUSR1 to any worker, as all workers learn of it after the same step.

    Every step starts an all-reduce of one number and looks at that of some steps before, so that nobody waits for a
    worker which is not that far behind. A step in which the program waits for its GPU looks at its own too: when all
    workers are known to have queued that step, the wait cannot be one for a worker that hangs.
    """

    LAG = 4  # steps
    GPU_LAG = 1  # for CUDA takes about a thousand kernels; then queueing more behind a worker that hangs waits too
    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, world: World, liveness: Liveness, timeout_s: float | None = None) -> None:
        self._liveness = liveness
        self._received = False
        on_gpu = world.device.type == "cuda"
        self._lag, self._lag_before_a_wait = (self.GPU_LAG, 0) if on_gpu else (self.LAG, self.LAG)
        self._under_way: deque[tuple[Tensor, dist.Work]] = deque()
        # A group of its own, on CPUs also where the others are on GPUs: reading the answer must not wait for a GPU.
        self._group: Any = dist.new_group(backend="gloo", timeout=group_timeout(timeout_s, torch.device("cpu")))
        for number in self.SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, *_: object) -> None:
        self._received = True

    def agreed(self, step: int, *, before_a_wait: bool) -> bool:
        """Whether to stop after this step, the `step`-th. Called by all workers once in every step.

        before_a_wait: what comes next may wait for the GPU, on all workers; to stop is to wait for it too.
        """
        self._liveness.step = step
        flag = torch.tensor(float(self._received))
        work = dist.all_reduce(flag, group=self._group, async_op=True)
        assert work is not None
        self._under_way.append((flag, work))
        stopping, lag = False, self._lag_before_a_wait if before_a_wait else self._lag
        while len(self._under_way) > lag:
            flag, work = self._under_way.popleft()
            work.wait()
            if flag.item() > 0:
                stopping, lag = True, self._lag_before_a_wait
        return stopping

    def close(self) -> None:
        """There is nothing left to stop: a second signal must not kill a worker that is on its way out."""
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
