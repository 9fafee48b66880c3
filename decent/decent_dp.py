"""Decentralized data parallel training: every worker has its own parameters and averages them with a few neighbours.

    for each step:                     x_i  parameters of worker i
        loss.backward()                g_i  gradient at x_i
        model.mix()                    x_i <- sum_j W[i, j] x_j, of the exchange started one step before
        optimizer.step()               x_i <- x_i + update(g_i)
        model.exchange()               start sending x_i

    training     forward, backward | mix, step | forward, backward | mix, step | forward, backward | mix, step
    background                                 └───── exchange ────┘           └───── exchange ────┘

No autograd hooks: all parameters are views of one flat buffer per dtype, which an exchange reads between two steps.
"""

from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from decent.exchange import Exchange
from decent.liveness import PeerError, first_line
from decent.topology import build_topology, default_topology
from decent.world import World

ALIGNMENT_BYTES = 128  # alignment of each parameter in the flat buffer, for kernels with vector loads


class DecentDP(nn.Module):
    """Wraps `module` for gossip averaging. All workers start with rank 0's parameters and buffers.

    `mix` and `exchange` are collectives: every worker calls both once in every step, in this order, also when it skips
    the update. The module's parameters must stay the tensors that they are at construction.

    topology = None means `default_topology`. Pairs of workers or of nodes send parameters rounded to comm_dtype, which
    keeps the mean over the workers. gossip_every = k > 1 exchanges a snapshot s of every k-th step, hidden behind k
    steps of local training: x_i <- x_i + sum_j W[i, j] s_j - s_i. It costs one more copy of the parameters. timeout_s
    limits how long mix waits for another worker; None means PyTorch's default.

    Raises:
        ValueError: there is no such topology, it does not fit the world, or it cannot be rounded to comm_dtype.
    """

    replicated = False  # the workers hold different parameters

    def __init__(
        self,
        module: nn.Module,
        topology: str | None = None,
        local_world_size: int | None = None,
        comm_dtype: torch.dtype | None = None,
        gossip_every: int = 1,
        timeout_s: float | None = None,
    ) -> None:
        super().__init__()
        if gossip_every < 1:
            raise ValueError(f"gossip_every = {gossip_every} must be at least 1")
        n, local_world_size = dist.get_world_size(), local_world_size or World.from_env().local_world_size
        self.module = module
        self.topology = build_topology(topology or default_topology(n, local_world_size), n, local_world_size)
        self.gossip_every = gossip_every  # k
        self.step = 0  # calls of exchange() so far
        self._flat = flatten_parameters(module, multiple_of=local_world_size)  # one 1-D buffer per dtype
        self._exchange = Exchange(
            self.topology, self._flat, comm_dtype=comm_dtype, snapshot=gossip_every > 1, timeout_s=timeout_s
        )
        self._mixed = True  # False after exchange(), until mix()
        self._inside_averaged = False
        for tensor in [*self._flat, *module.buffers()]:
            dist.broadcast(tensor, src=0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def no_sync(self) -> AbstractContextManager[None]:
        """Do nothing, as gradients never travel. torch's DDP needs it for all micro-batches but the last."""
        return nullcontext()

    @property
    def _is_exchange_step(self) -> bool:
        """Return whether this step's mix waits for an exchange, and this step's exchange starts the next."""
        return (self.step + 1) % self.gossip_every == 0

    def mix(self) -> None:
        """Set x <- W x by the exchange in flight. Before the first exchange all workers are equal."""
        self._require_own_parameters()
        if self.step % 100 == 0:  # a walk over all parameters costs about as much as a mix
            self._require_flat_parameters()
        self._mixed = True
        if self._is_exchange_step:
            with record_function("gossip.mix"), self._blame(self._exchange.peers):
                self._exchange.finish_()

    def exchange(self) -> None:
        """Start the next averaging and return at once. Nothing may change a parameter until the next mix."""
        self._require_own_parameters()
        if not self._mixed:
            raise RuntimeError("exchange() was called twice without mix() between")
        self._mixed = False
        if self._is_exchange_step:
            self._exchange.start((self.step + 1) // self.gossip_every)
        self.step += 1

    def in_flight(self) -> dict[str, Any]:
        """State that `resume_exchange` needs, besides the parameters, to start the exchange in flight again."""
        return {"step": self.step, "gossip_every": self.gossip_every, "snapshots": self._exchange.snapshots}

    def resume_exchange(self, in_flight: dict[str, Any]) -> None:
        """Start the exchange again that was in flight when the parameters, now loaded, were saved. A collective, called
        between an exchange and a mix. Snapshots of another gossip_every are dropped."""
        self._require_flat_parameters()
        self.step, self._mixed = in_flight["step"], False
        if self.step >= self.gossip_every == in_flight["gossip_every"]:
            self._exchange.start(self.step // self.gossip_every, in_flight["snapshots"])

    def wait(self) -> None:
        """Wait for the exchange in flight. Its result stays valid for the next mix."""
        with self._blame(self._exchange.peers):
            self._exchange.wait()

    @contextmanager
    def averaged(self) -> Generator[None]:
        """Hold the exact mean of all workers' models inside the block, the same bits on each. After it every worker has
        its own parameters and statistics back, bit by bit, and the exchange in flight keeps its result."""
        self._require_own_parameters()
        self._require_flat_parameters()
        statistics = [b for b in self.module.buffers() if b.is_floating_point()]  # as of batch norm
        tensors = [*self._flat, *statistics]
        self.wait()  # the exchange reads the buffers that change now
        own = [t.clone() for t in tensors]
        self._mean_over_workers_(tensors)
        self._inside_averaged = True
        try:
            yield
        finally:
            self._inside_averaged = False
            for t, saved in zip(tensors, own, strict=True):
                t.copy_(saved)

    def consensus_distance(self) -> float:
        """Return sqrt(1/n sum_i |x_i - mean|^2) over all parameters (Kong et al. 2021, "Consensus Control for
        Decentralized Deep Learning"). A collective."""
        self._require_own_parameters()
        self.wait()
        means = [x.clone() for x in self._flat]
        self._mean_over_workers_(means)
        deviations = [mean.sub_(x) for mean, x in zip(means, self._flat, strict=True)]
        squares = torch.stack([torch.linalg.vector_norm(d, dtype=torch.float64) ** 2 for d in deviations]).sum()
        self._mean_over_workers_([squares])
        return squares.sqrt().item()

    def _mean_over_workers_(self, tensors: Iterable[Tensor]) -> None:
        with self._blame(range(dist.get_world_size())):
            for t in tensors:
                dist.all_reduce(t)
                t.div_(dist.get_world_size())

    @contextmanager
    def _blame(self, peers: Iterable[int]) -> Generator[None]:
        """Turn a failed collective into a PeerError that names the step and the ranks waited for."""
        try:
            yield
        except RuntimeError as error:
            ranks = ", ".join(str(peer) for peer in peers if peer != dist.get_rank())
            raise PeerError(f"step {self.step}: no answer from rank {ranks}: {first_line(error)}") from error

    def _require_own_parameters(self) -> None:
        if self._inside_averaged:
            raise RuntimeError("not inside averaged(): the parameters are not this worker's own there")

    def _require_flat_parameters(self) -> None:
        storages = {x.untyped_storage().data_ptr() for x in self._flat}
        if any(p.untyped_storage().data_ptr() not in storages for p in self.module.parameters()):
            raise RuntimeError(
                "parameters were replaced: call .to() and load_state_dict(assign=True) before DecentDP()"
            )


def flatten_parameters(module: nn.Module, *, multiple_of: int = 1) -> list[Tensor]:
    """Make the parameters views of 1-D buffers, one per dtype, and return the buffers, zero-padded to a multiple."""
    buffers: list[Tensor] = []
    parameters = list(module.parameters())  # tied ones once
    for dtype in sorted({p.dtype for p in parameters}, key=str):
        members = [p for p in parameters if p.dtype == dtype]
        align = ALIGNMENT_BYTES // dtype.itemsize
        sizes = [-(-p.numel() // align) * align for p in members]
        total = -(-sum(sizes) // (align * multiple_of)) * align * multiple_of
        flat = torch.zeros(total, dtype=dtype, device=members[0].device)
        for p, place in zip(members, flat[: sum(sizes)].split(sizes), strict=True):
            p.data = place[: p.numel()].view(p.shape).copy_(p.detach())
        buffers.append(flat)
    return buffers
