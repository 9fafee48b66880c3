"""Decentralized data parallel training: every worker has its own parameters and averages them with a few neighbours.

    for each step:                     x_i  parameters of worker i
        loss.backward()                g_i  gradient at x_i
        model.mix()                    x_i <- sum_j W[i, j] x_j, of the exchange started one step before
        optimizer.step()               x_i <- x_i + update(g_i)
        model.exchange()               starts sending x_i; the next forward and backward hide it

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

ALIGNMENT_BYTES = 128  # of each parameter in the flat buffer, as kernels with vector loads want it


class DecentDP(nn.Module):
    """Wraps `module` for gossip averaging. All workers start with rank 0's parameters and buffers.

    `mix` and `exchange` are collectives: every worker calls both once in every step, in this order, also when it skips
    the update. The module's parameters must stay the tensors that they are at construction.

    comm_dtype, if given, is the dtype in which parameters travel between pairs, and between nodes where whole nodes
    average; the mean over the workers does not feel the rounding. gossip_every = k > 1 exchanges a snapshot s of every
    k-th step, hidden behind k steps of local training: x_i <- x_i + sum_j W[i, j] s_j - s_i. It costs one more copy of
    the parameters. timeout_s: how long mix waits for another worker; None is PyTorch's default.

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
        local_world_size = local_world_size or World.from_env().local_world_size
        self.module = module
        topology = topology or default_topology(dist.get_world_size(), local_world_size)
        self.topology = build_topology(topology, dist.get_world_size(), local_world_size)
        self.gossip_every = gossip_every  # k
        self.step = 0  # calls of exchange() so far
        self._flat = flatten_parameters(module, multiple_of=local_world_size)  # one 1-D buffer per dtype
        # Where the module keeps its parameters: walking it anew in every step would cost as much as a mix.
        self._places = [(m._parameters, k) for m in module.modules() for k, p in m._parameters.items() if p is not None]
        self._addresses = self._find_addresses()
        self._statistics = [b for b in module.buffers() if b.is_floating_point()]  # as of batch norm
        self._exchange = Exchange(
            self.topology, self._flat, comm_dtype=comm_dtype, snapshot=gossip_every > 1, timeout_s=timeout_s
        )
        self._mixed = True  # whose turn it is: False after exchange(), until mix()
        self._inside_averaged = False  # inside averaged()
        for tensor in [*self._flat, *module.buffers()]:
            dist.broadcast(tensor, src=0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def no_sync(self) -> AbstractContextManager[None]:
        """For the backward of all micro-batches but the last, as torch's DDP has it; gradients never travel here."""
        return nullcontext()

    def mix(self) -> None:
        """x <- W x with the values of the exchange in flight; before the first exchange all workers are equal."""
        self._check_usable()
        self._mixed = True
        if (self.step + 1) % self.gossip_every == 0:
            with record_function("gossip.mix"), self._naming(self._exchange.peers):
                self._exchange.finish_()

    def exchange(self) -> None:
        """Starts the next averaging and returns at once. Nothing may change a parameter until the next mix."""
        self._check_own()
        if not self._mixed:
            raise RuntimeError("exchange() was called twice without mix() between")
        self._mixed = False
        self.step += 1
        if self.step % self.gossip_every == 0:
            self._exchange.start(self.step // self.gossip_every)

    def in_flight(self) -> dict[str, Any]:
        """What `resume_exchange` needs, besides the parameters, to start the exchange in flight once more."""
        return {"step": self.step, "gossip_every": self.gossip_every, "snapshots": self._exchange.snapshots}

    def resume_exchange(self, in_flight: dict[str, Any]) -> None:
        """Starts an exchange again that was in flight when the parameters, which are loaded by now, were saved.

        A collective, between an exchange and a mix. Snapshots of another gossip_every are dropped.
        """
        self.step, self._mixed = in_flight["step"], False
        if self.step >= self.gossip_every == in_flight["gossip_every"]:
            self._exchange.start(self.step // self.gossip_every, in_flight["snapshots"])

    def wait(self) -> None:
        """Until the exchange in flight has arrived; its values stay for the next mix."""
        with self._naming(self._exchange.peers):
            self._exchange.wait()

    @contextmanager
    def averaged(self) -> Generator[None]:
        """Inside the block the module is the exact mean of all workers' models, the same on each; after it every
        worker has its own parameters and statistics back, bit by bit, and the exchange in flight keeps its values."""
        self._check_usable()
        tensors = [*self._flat, *self._statistics]
        self.wait()  # the exchange reads the buffers that change now
        own = [t.clone() for t in tensors]
        with self._naming(range(dist.get_world_size())):
            for t in tensors:
                _mean_over_workers_(t)
        self._inside_averaged = True
        try:
            yield
        finally:
            self._inside_averaged = False
            with torch.no_grad():
                for t, saved in zip(tensors, own, strict=True):
                    t.copy_(saved)

    @torch.no_grad()
    def consensus_distance(self) -> float:
        """sqrt(1/n sum_i |x_i - mean|^2), over all parameters (Kong et al. 2021, "Consensus Control for Decentralized
        Deep Learning"). A collective."""
        self._check_usable()
        self.wait()
        squares = torch.zeros((), dtype=torch.float64, device=self._flat[0].device)
        with self._naming(range(dist.get_world_size())):
            for x in self._flat:
                mean = x.clone()
                _mean_over_workers_(mean)
                squares += torch.linalg.vector_norm(mean.sub_(x), dtype=torch.float64) ** 2
            _mean_over_workers_(squares)
        return squares.sqrt().item()

    @contextmanager
    def _naming(self, peers: Iterable[int]) -> Generator[None]:
        """Adds to what the backend says of a failed collective whom this worker waited for, and when."""
        try:
            yield
        except RuntimeError as error:
            reason = first_line(error)
            ranks = ", ".join(str(rank) for rank in peers if rank != dist.get_rank())
            raise PeerError(f"step {self.step}: waited in vain for rank {ranks}: {reason}") from error

    def _check_own(self) -> None:
        if self._inside_averaged:
            raise RuntimeError("not inside averaged(): the parameters are not this worker's own there")

    def _check_usable(self) -> None:
        self._check_own()
        if self._find_addresses() != self._addresses:
            raise RuntimeError(
                "the module's parameters were replaced after it was wrapped, as load_state_dict(assign=True) or "
                ".to(...) do: do that before, or load without assign"
            )

    def _find_addresses(self) -> list[int]:
        """Of each parameter's memory now; tied ones repeat."""
        return [0 if (p := parameters[name]) is None else p.data_ptr() for parameters, name in self._places]


def flatten_parameters(module: nn.Module, *, multiple_of: int = 1) -> list[Tensor]:
    """Makes the parameters views of one zero-padded 1-D buffer per dtype and returns the buffers.

    A buffer's length is divisible by `multiple_of`.
    """
    buffers: list[Tensor] = []
    parameters = list(module.parameters())  # tied ones once
    for dtype in sorted({p.dtype for p in parameters}, key=str):
        members = [p for p in parameters if p.dtype == dtype]
        align = ALIGNMENT_BYTES // dtype.itemsize
        sizes = [-(-p.numel() // align) * align for p in members]
        total = -(-sum(sizes) // (align * multiple_of)) * align * multiple_of
        flat = torch.zeros(total, dtype=dtype, device=members[0].device)
        for p, place in zip(members, flat[: sum(sizes)].split(sizes), strict=True):
            view = place[: p.numel()].view(p.shape)
            view.copy_(p.detach())
            p.data = view
        buffers.append(flat)
    return buffers


def _mean_over_workers_(x: Tensor) -> None:
    dist.all_reduce(x)
    x.div_(dist.get_world_size())
