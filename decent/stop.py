"""A request to stop the run, which all workers learn of after the same step."""

import signal
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from decent.liveness import Liveness
from decent.world import World, group_timeout


class StopRequest:
    """SIGTERM or SIGUSR1 to any worker.

    Every step starts an all-reduce of the workers' flags, and reads the result of the step LAG steps before:

        step        1    2    3    4    5    6    7      so a worker waits only for workers
        reads flag                      1    2    3      that are more than LAG steps behind

    Before the host blocks on the GPU, the flag of the current step is awaited as well. Then every worker has queued
    this step, and the block cannot be caused by a hanging worker.
    """

    LAG = 4  # steps
    GPU_LAG = 1  # CUDA queues about 1,000 kernels: with a larger lag, launches would block behind a hanging worker
    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, world: World, liveness: Liveness, timeout_s: float | None = None) -> None:
        self._liveness = liveness
        self._received = False
        on_gpu = world.device.type == "cuda"
        self._lag, self._lag_if_host_blocks = (self.GPU_LAG, 0) if on_gpu else (self.LAG, self.LAG)
        self._under_way: deque[tuple[Tensor, dist.Work]] = deque()  # oldest step first
        # A gloo group also where the other groups are NCCL's: reading a flag must not wait for a GPU.
        self._group: Any = dist.new_group(backend="gloo", timeout=group_timeout(timeout_s, torch.device("cpu")))
        for number in self.SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, *_: object) -> None:
        self._received = True

    def agreed(self, step: int, *, host_blocks: bool) -> bool:
        """Return whether to stop after this step, the `step`-th, on all workers alike. Called once in every step.

        host_blocks: on all workers alike, the host may wait for the GPU before the next call.
        """
        self._liveness.step = step
        flag = torch.tensor(float(self._received))
        work = dist.all_reduce(flag, group=self._group, async_op=True)
        assert work is not None
        self._under_way.append((flag, work))
        stopping, lag = False, self._lag_if_host_blocks if host_blocks else self._lag
        while len(self._under_way) > lag:
            flag, work = self._under_way.popleft()
            work.wait()
            if flag.item() > 0:
                stopping, lag = True, self._lag_if_host_blocks  # the save that follows blocks too
        return stopping

    def close(self) -> None:
        """Ignore further signals: a second one must not kill a worker that is leaving."""
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
