"""Decentralized training of n workers in one process, X <- update(W X, G), in its plainest form.

The tests compare the real workers with it, and it serves for small experiments. X is (n, d): row i holds the parameters
of worker i, here tensor by tensor.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from decent.exchange import plan_route
from decent.topology import Topology


def simulate(
    modules: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    topology: Topology,
    backward: Callable[[nn.Module, int, int], None],
    *,
    n_steps: int,
    grad_norm_clip: float = 0.0,
    comm_dtype: torch.dtype | None = None,
    gossip_every: int = 1,
) -> None:
    """Train the workers in place for n_steps; they should start equal, as under DecentDP.

    backward(module, rank, step) adds the worker's gradient of that step to p.grad, in any number of micro-batches.
    grad_norm_clip = 0 means no clipping. comm_dtype and gossip_every have the meaning that they have in DecentDP.
    """
    snapshots = stack_parameters(modules)
    for step in range(n_steps):
        for rank, (module, optimizer) in enumerate(zip(modules, optimizers, strict=True)):
            optimizer.zero_grad()
            backward(module, rank, step)
            if grad_norm_clip:
                nn.utils.clip_grad_norm_(module.parameters(), grad_norm_clip)
        if (step + 1) % gossip_every == 0:
            mix_(modules, snapshots, topology, step // gossip_every, comm_dtype)
        for optimizer in optimizers:
            optimizer.step()
        if (step + 1) % gossip_every == 0:
            snapshots = stack_parameters(modules)


@torch.no_grad()
def mix_(
    modules: Sequence[nn.Module],
    snapshots: Sequence[Tensor],
    topology: Topology,
    step: int,
    comm_dtype: torch.dtype | None = None,
) -> None:
    """Set X <- X + M(S) - S in float64, where M(S) = Y + B Q(Y) - Q(Y), Y = A S, and Q rounds to comm_dtype.

    Without rounding M(S) = W S, since W = B A.
    """
    a, b = (torch.from_numpy(w) for w in factors(topology, step))
    for parameters, s in zip(zip(*(m.parameters() for m in modules), strict=True), snapshots, strict=True):
        y = torch.tensordot(a, s, dims=1)
        q = y.to(parameters[0].dtype).to(comm_dtype).double() if comm_dtype else y
        mixed = y + torch.tensordot(b, q, dims=1) - q
        for p, change in zip(parameters, mixed - s, strict=True):
            p.copy_(p.double() + change)


def factors(topology: Topology, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (A, B), each (n, n), with B A = W: A averages by collectives of a group, B between pairs of ranks."""
    inside, between = np.eye(topology.world_size), topology.matrix(step)
    for rank in range(topology.world_size):
        route = plan_route(topology, step, rank)
        if route.kind == "two_nodes":
            inside[rank], between[rank] = 0, 0
            inside[rank, list(route.node)] = 1 / len(route.node)
            between[rank, [rank, route.receive_from]] = 0.5
        elif route.kind == "group":
            inside[rank], between[rank] = between[rank], inside[rank]
    return inside, between


def stack_parameters(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Return all workers' values of each parameter in float64, (n, *shape)."""
    groups = zip(*(module.parameters() for module in modules), strict=True)
    return [torch.stack([p.detach().double() for p in parameters]) for parameters in groups]
