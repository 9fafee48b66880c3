"""All-Reduce data parallel training: torch's DDP with the verbs of DecentDP, so that the loop has no branches."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class AllReduceDP(DistributedDataParallel):
    """All workers hold the same parameters; backward averages their gradients."""

    replicated = True

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__(module, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)

    def rebuild_buckets(self, *inputs: Tensor) -> None:
        """A backward whose gradients are thrown away; inputs: of a micro-batch, for module(*inputs)[1] to be the loss.

        DDP sorts its buckets anew after its first backward, and with the buckets the order changes in which more than
        two workers' gradients are added. After this every step rounds alike, also the first one of a run that resumes.
        """
        self(*inputs)[1].backward()
        self.zero_grad()

    def mix(self) -> None:
        """Nothing: the parameters of the workers are equal."""

    def exchange(self) -> None:
        """Nothing: the gradients have been exchanged in backward."""

    def in_flight(self) -> dict[str, Any]:
        """Nothing, between two steps."""
        return {}

    def resume_exchange(self, in_flight: dict[str, Any]) -> None:
        """Nothing to do."""

    def averaged(self) -> AbstractContextManager[None]:
        """The module is the mean of all workers' at any time."""
        return nullcontext()

    def consensus_distance(self) -> float:
        return 0.0
