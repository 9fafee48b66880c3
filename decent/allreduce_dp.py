"""All-Reduce data parallel training: torch's DDP with the verbs of DecentDP, so that the loop has no branches."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class AllReduceDP(DistributedDataParallel):
    """All workers hold the same parameters; backward averages their gradients.

    DDP sorts its buckets again after its first backward, and sums of more than two gradients change with their order.
    With an example, inputs for which module(*example)[1] is a loss, that backward is made here, and its gradients are
    dropped. Then every step rounds alike, also the first one of a run that resumes.
    """

    replicated = True

    def __init__(self, module: nn.Module, device: torch.device, example: tuple[Tensor, ...] | None = None) -> None:
        super().__init__(module, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)
        if example is not None:
            self(*example)[1].backward()
            self.zero_grad()

    def mix(self) -> None:
        """Do nothing: the parameters of the workers are equal."""

    def exchange(self) -> None:
        """Do nothing: the gradients have been exchanged in backward."""

    def in_flight(self) -> dict[str, Any]:
        """Return {}: between two steps nothing is under way."""
        return {}

    def resume_exchange(self, in_flight: dict[str, Any]) -> None:
        """Do nothing: nothing was under way."""

    def averaged(self) -> AbstractContextManager[None]:
        """Leave the module as it is: it is the mean of all workers' at any time."""
        return nullcontext()

    def consensus_distance(self) -> float:
        return 0.0
