"""n workers in one process, X <- update(W X, G): what decentralized training means, written down plainly.

The oracle of the tests of everything that travels between processes, and a laboratory for small experiments.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from decent.topology import Topology


def simulate(
    modules: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    topology: Topology,
    backward: Callable[[nn.Module, int, int], None],
    *,
    n_steps: int,
    grad_norm_clip: float = 0.0,
) -> None:
    """Trains the workers in place for n_steps; they should start equal, as under DecentDP.

    backward(module, rank, step) adds the worker's gradient of that step to p.grad, in as many micro-batches as it
    likes. grad_norm_clip = 0 is off.
    """
    for step in range(n_steps):
        for rank, (module, optimizer) in enumerate(zip(modules, optimizers, strict=True)):
            optimizer.zero_grad()
            backward(module, rank, step)
            if grad_norm_clip:
                nn.utils.clip_grad_norm_(module.parameters(), grad_norm_clip)
        mix_(modules, topology.matrix(step))
        for optimizer in optimizers:
            optimizer.step()


@torch.no_grad()
def mix_(modules: Sequence[nn.Module], w: np.ndarray) -> None:
    """X <- W X for the (n, n) mixing matrix W, where row i of X is worker i's parameters; computed in float64."""
    weights = torch.from_numpy(w)
    for parameters in zip(*(module.parameters() for module in modules), strict=True):
        x = torch.stack([p.double() for p in parameters])  # (n, *shape)
        for p, mixed in zip(parameters, torch.tensordot(weights, x, dims=1), strict=True):
            p.copy_(mixed)


def mean_parameters(modules: Sequence[nn.Module]) -> list[Tensor]:
    """The workers' mean of each parameter, in float64."""
    groups = zip(*(module.parameters() for module in modules), strict=True)
    return [torch.stack([p.detach().double() for p in parameters]).mean(0) for parameters in groups]
