"""One averaging of flat buffers with the neighbours, carried out beside the computation.

An exchange is written as ordinary blocking calls, one after the other, and run in the background: by a thread under
gloo, on a CUDA stream of its own under NCCL. Which primitives carry it is decided here and nowhere else, for these
reasons (DESIGN 5.1). Under gloo one large send/receive pair fills half of a link, since its two directions take turns;
an all-reduce in a group of two fills it, and what has no group is sent in chunks. Under NCCL every group costs GPU
memory, so pairs send and receive in the world's group.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from decent.topology import Topology

CHUNK_BYTES = 4 * 2**20  # of a gloo send; six chunks of 42 MB reached 82% of a link, one 48%


@dataclass(frozen=True)
class Route:
    """How one worker's averaging of one round travels."""

    kind: Literal["stay", "pair", "shift", "two_nodes", "group"]
    group: tuple[int, ...]  # ranks that are averaged, sorted
    send_to: int = -1  # pair, shift: the rank that needs ours
    receive_from: int = -1  # pair, shift: the rank whose parameters we need
    node: tuple[int, ...] = ()  # two_nodes: the workers of this node
    counterparts: tuple[int, ...] = ()  # two_nodes: this worker and the one with its local rank on the other node


def plan_route(topology: Topology, step: int, rank: int) -> Route:
    """Pure: the route of `rank` at `step`."""
    group = topology.group(step, rank)
    local = topology.local_world_size
    if len(group) == 1:
        return Route("stay", group)
    if topology.group(step, group[0]) != topology.group(step, group[-1]):
        (source,) = set(group) - {rank}
        (target,) = {i for i in range(topology.world_size) if rank in topology.group(step, i)} - {rank}
        return Route("shift", group, send_to=target, receive_from=source)
    if len(group) == 2:
        (peer,) = set(group) - {rank}
        return Route("pair", group, send_to=peer, receive_from=peer)
    if len({i // local for i in group}) == 2 and len(group) == 2 * local:
        node = tuple(i for i in group if i // local == rank // local)
        counterparts = tuple(i for i in group if i % local == rank % local)
        return Route("two_nodes", group, node=node, counterparts=counterparts)
    return Route("group", group)


def plan_groups(topology: Topology, pairs: bool) -> list[tuple[int, ...]]:
    """Pure: the process groups that all ranks must create, in this order. Without `pairs`, two ranks need none."""
    groups: set[tuple[int, ...]] = set()
    for step in range(topology.period):
        for rank in range(topology.world_size):
            route = plan_route(topology, step, rank)
            if route.kind == "two_nodes":
                groups |= {route.node, route.counterparts} if pairs else {route.node}
            elif route.kind == "group" or (route.kind == "pair" and pairs):
                groups.add(route.group)
    return sorted(groups)


class Exchange:
    """Averages `buffers` over the groups of a topology: `start`, then `finish_`.

    A buffer is 1-D and divisible by the local world size. Nothing may write to it between `start` and `wait` or
    `finish_`.
    """

    def __init__(self, topology: Topology, buffers: list[Tensor]) -> None:
        self.buffers = buffers
        self._averages = [torch.empty_like(buffer) for buffer in buffers]  # hold W x after wait()
        self._topology = topology
        self._rank = dist.get_rank()
        self._gloo = dist.get_backend() == "gloo"
        # gloo matches collectives by their order, which a thread of its own cannot share with the rest of the program.
        self._everyone: Any = dist.new_group() if self._gloo else dist.group.WORLD
        # All ranks create all groups in the same order, also those that they are not in.
        self._groups: dict[tuple[int, ...], Any] = {
            ranks: self._everyone if len(ranks) == topology.world_size else dist.new_group(list(ranks))
            for ranks in plan_groups(topology, pairs=self._gloo)
        }
        self._route: Route | None = None  # of the exchange in flight
        self._background = _CudaStream(buffers[0].device) if buffers[0].is_cuda else _Thread()

    def start(self, step: int) -> None:
        """Starts the averaging of `step` and returns at once."""
        self._route = route = plan_route(self._topology, step, self._rank)
        if route.kind != "stay":
            self._background.run(lambda: self._average(route))

    def wait(self) -> None:
        """Until the averages are there and the buffers are free again. Raises what the exchange raised. Idempotent."""
        self._background.wait()

    @torch.no_grad()
    def finish_(self) -> None:
        """buffers <- W buffers, once for each start; nothing when none was started."""
        route, self._route = self._route, None
        if route is not None and route.kind != "stay":
            self.wait()
            for x, average in zip(self.buffers, self._averages, strict=True):
                x.copy_(average)

    @property
    def in_flight(self) -> bool:
        """An exchange was started and is not finished."""
        return self._route is not None

    @torch.no_grad()
    def _average(self, route: Route) -> None:
        carry = {
            "pair": self._all_reduce if self._gloo else self._shift,
            "shift": self._shift,
            "two_nodes": self._two_nodes,
            "group": self._all_reduce,
        }[route.kind]
        with record_function(f"gossip.{route.kind}"):
            for x, average in zip(self.buffers, self._averages, strict=True):
                carry(x, average, route)

    def _all_reduce(self, x: Tensor, average: Tensor, route: Route) -> None:
        torch.mul(x, 1 / len(route.group), out=average)
        dist.all_reduce(average, group=self._groups[route.group])

    def _shift(self, x: Tensor, average: Tensor, route: Route) -> None:
        self._send_and_receive(x, average, send_to=route.send_to, receive_from=route.receive_from)
        average.add_(x).mul_(0.5)  # symmetric in both, so that the two workers of a pair get the same bits

    def _two_nodes(self, x: Tensor, average: Tensor, route: Route) -> None:
        """Each worker carries one shard between the nodes: x.numel() elements cross a network card, not per worker."""
        node = self._groups[route.node]
        local_rank = route.node.index(self._rank)
        shard = average.view(len(route.node), -1)[local_rank]
        dist.reduce_scatter_single(shard, x, group=node)
        if self._gloo:
            dist.all_reduce(shard, group=self._groups[route.counterparts])
        else:
            theirs = torch.empty_like(shard)
            (peer,) = set(route.counterparts) - {self._rank}
            self._send_and_receive(shard, theirs, send_to=peer, receive_from=peer)
            shard.add_(theirs)
        shard.mul_(1 / len(route.group))
        dist.all_gather_single(average, shard, group=node)

    def _send_and_receive(self, x: Tensor, received: Tensor, *, send_to: int, receive_from: int) -> None:
        chunk = max(1, CHUNK_BYTES // x.element_size()) if self._gloo else x.numel()
        operations = []
        for mine, theirs in zip(x.split(chunk), received.split(chunk), strict=True):
            operations.append(dist.P2POp(dist.isend, mine, send_to, self._everyone))
            operations.append(dist.P2POp(dist.irecv, theirs, receive_from, self._everyone))
        for work in dist.batch_isend_irecv(operations):
            work.wait()  # exactly once: a second wait of a gloo send or receive hangs


class _Thread:
    """Runs one function at a time in a thread; gloo's calls release the interpreter while they wait."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gossip")
        self._running: Future[None] | None = None

    def run(self, function: Callable[[], None]) -> None:
        self._running = self._executor.submit(function)

    def wait(self) -> None:
        if self._running is not None:
            self._running.result()


class _CudaStream:
    """Queues a function's kernels and collectives on a stream of its own; no call blocks the host."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def run(self, function: Callable[[], None]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function()

    def wait(self) -> None:
        torch.cuda.current_stream().wait_stream(self._stream)
