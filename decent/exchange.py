"""One averaging of flat buffers with the neighbours, in the background of the computation.

An exchange is written as ordinary blocking calls; a thread runs them under gloo, a CUDA stream of its own under NCCL.
Pieces are handed over as they arrive, so that after the last byte only one is left to copy. Ways in which a round can
travel, which are chosen here alone:

* Pairs and shifts send and receive chunks, several at a time, which fills a link in both directions. (One large send
  and receive alternate. A process group of two would cost threads under gloo and half a gigabyte under NCCL.)
* Workers of two whole nodes exchange shards: each sums one shard inside its node, averages it with its counterpart on
  the other node, and broadcasts it inside its node. An all-reduce over both nodes would send nearly twice as much.
* Any other group uses an all-reduce.
"""

import queue
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from decent.topology import Topology
from decent.world import group_timeout

CHUNK_BYTES = {"gloo": 2**20, "nccl": 2**26}  # size of a message before rounding; NCCL launches a kernel for each
CHUNKS_UNDER_WAY = 8
SEGMENTS = 8  # parts of a buffer that two nodes average one after the other

Piece = tuple[int, slice]  # index of a buffer, and the part of it
Chunk = tuple[slice, Tensor, Tensor, list[Any]]  # part of a buffer, ours, theirs, works to wait for


@dataclass(frozen=True)
class Route:
    """How one worker averages in one round."""

    kind: Literal["stay", "pair", "two_nodes", "group"]
    ranks: tuple[int, ...]  # ranks that take part, sorted
    send_to: int | None = None  # pair: the rank that needs our parameters; two_nodes: our counterpart
    receive_from: int | None = None  # pair: the rank whose parameters we need; differs from send_to in directed rounds
    node: tuple[int, ...] = ()  # two_nodes: the workers of this node


def plan_route(topology: Topology, step: int, rank: int) -> Route:
    """Return the route of `rank` at `step`. Pure."""
    group, local = topology.group(step, rank), topology.local_world_size
    if len(group) == 1:
        return Route("stay", group)
    if len(group) == 2:
        (source,) = set(group) - {rank}
        target = source
        if topology.group(step, source) != group:  # a directed round
            (target,) = {i for i in range(topology.world_size) if rank in topology.group(step, i)} - {rank}
        return Route("pair", tuple(sorted({*group, target})), send_to=target, receive_from=source)
    if len(group) == 2 * local and len({i // local for i in group}) == 2:
        node = tuple(i for i in group if i // local == rank // local)
        (counterpart,) = {i for i in group if i % local == rank % local} - {rank}
        return Route("two_nodes", group, send_to=counterpart, receive_from=counterpart, node=node)
    return Route("group", group)


def plan_groups(topology: Topology) -> list[tuple[int, ...]]:
    """Return the process groups that all ranks must create, in this order. Pure."""
    routes = [plan_route(topology, step, i) for step in range(topology.period) for i in range(topology.world_size)]
    return sorted({r.node for r in routes if r.kind == "two_nodes"} | {r.ranks for r in routes if r.kind == "group"})


class Exchange:
    """Averages `buffers` over the groups of a topology: `start`, then `finish_`.

    A buffer is 1-D and divisible by the local world size. If pairs send Q(x), rounded to comm_dtype, the average is
    x_i + (Q(x_j) - Q(x_i)) / 2, so that rounding moves no mean. Without snapshot nothing may write to the buffers
    between `start` and `wait` or `finish_`. timeout_s limits the wait for a peer; None means PyTorch's default.
    """

    def __init__(
        self,
        topology: Topology,
        buffers: list[Tensor],
        *,
        comm_dtype: torch.dtype | None = None,
        snapshot: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        if comm_dtype is not None and topology.name == "complete":
            # Rounding inside an all-reduce would move the mean in every step, by as much as an update does.
            raise ValueError(f'topology "complete" cannot send {comm_dtype}: use "exp", "ring" or float32')
        self._routes = [plan_route(topology, step, dist.get_rank()) for step in range(topology.period)]
        self._comm_dtype = comm_dtype
        self._chunk_bytes = CHUNK_BYTES[dist.get_backend()]
        self._buffers = buffers
        self.snapshots = [b.clone() for b in buffers] if snapshot else []  # sent by the exchange in flight
        self._averages = [torch.empty_like(b) for b in buffers]  # after wait(): W x, or W s of snapshots s
        # gloo matches calls by their order, which a thread of its own cannot share with the rest of the program.
        timeout = group_timeout(timeout_s, buffers[0].device)
        self._everyone: Any = dist.group.WORLD if dist.get_backend() == "nccl" else dist.new_group(timeout=timeout)
        # All ranks create all groups in the same order, also groups that they are not in.
        self._groups: dict[tuple[int, ...], Any] = {
            ranks: self._everyone if len(ranks) == topology.world_size else dist.new_group(list(ranks), timeout)
            for ranks in plan_groups(topology)
        }
        self._route: Route | None = None  # of the exchange in flight
        self._background = _CudaStream(buffers[0].device) if buffers[0].is_cuda else _Thread()

    @torch.no_grad()
    def start(self, step: int, snapshots: list[Tensor] | None = None) -> None:
        """Start the averaging of `step` and return at once. snapshots are sent in place of the buffers of now."""
        self._route = route = self._routes[step % len(self._routes)]
        if route.kind == "stay":
            return
        if self.snapshots:
            for snapshot, x in zip(self.snapshots, snapshots or self._buffers, strict=True):
                n = min(snapshot.numel(), x.numel())  # the padding at the end depends on the workers of a node
                snapshot[:n].copy_(x[:n])
        self._background.run(self._average(route))

    @property
    def peers(self) -> tuple[int, ...]:
        """Ranks that take part in the exchange in flight, this rank included, sorted."""
        return () if self._route is None else self._route.ranks

    def wait(self) -> None:
        """Wait until the averages are there and the buffers are free again. Raises what the exchange raised."""
        self._background.wait()

    @torch.no_grad()
    def finish_(self) -> None:
        """Set x <- W x, or x <- x + W s - s of the snapshot s, once for each start. Else change nothing."""
        if self._route is None or self._route.kind == "stay":
            return
        for i, piece in self._background.arrivals():
            x, average = self._buffers[i][piece], self._averages[i][piece]
            if self.snapshots:
                x.add_(average.sub_(self.snapshots[i][piece]))
            else:
                x.copy_(average)
        self._route = None

    @torch.no_grad()
    def _average(self, route: Route) -> Iterator[Piece]:
        """Fill the averages and yield each part that is final."""
        carry = {"pair": self._pair, "two_nodes": self._two_nodes, "group": self._group}[route.kind]
        with record_function(f"gossip.{route.kind}"):
            for i, (x, average) in enumerate(zip(self.snapshots or self._buffers, self._averages, strict=True)):
                yield from ((i, piece) for piece in carry(x, average, route))

    def _pair(self, x: Tensor, average: Tensor, route: Route) -> Iterator[slice]:
        """Set average <- (x + theirs) / 2, or x + (Q(theirs) - Q(x)) / 2 if rounded. May be in place."""
        size = self._chunk_bytes // x.element_size()
        to_start = deque(slice(begin, begin + size) for begin in range(0, x.numel(), size))
        under_way: deque[Chunk] = deque()
        while to_start or under_way:
            while to_start and len(under_way) < CHUNKS_UNDER_WAY:
                under_way.append(self._send_and_receive(to_start.popleft(), x, average, route))
            place, ours, theirs, works = under_way.popleft()
            _wait(works)
            if self._comm_dtype is None:
                torch.add(ours, theirs, out=average[place]).mul_(0.5)  # symmetric: both of a pair get the same bits
            else:
                torch.add(x[place], theirs.to(x.dtype).sub_(ours), alpha=0.5, out=average[place])
            yield place

    def _send_and_receive(self, place: slice, x: Tensor, average: Tensor, route: Route) -> Chunk:
        ours = x[place] if self._comm_dtype is None else x[place].to(self._comm_dtype)
        # Receive straight into the average where its place is free: no memory beside the averages.
        theirs = average[place] if self._comm_dtype is None and average is not x else torch.empty_like(ours)
        # Receive first: under gloo it tells the peer that it may send, and must not queue behind our own chunk.
        receive = dist.P2POp(dist.irecv, theirs, route.receive_from, self._everyone)
        send = dist.P2POp(dist.isend, ours, route.send_to, self._everyone)
        return place, ours, theirs, dist.batch_isend_irecv([receive, send])

    def _two_nodes(self, x: Tensor, average: Tensor, route: Route) -> Iterator[slice]:
        """Average segment by segment, so that traffic inside the nodes overlaps with traffic between them."""
        node = self._groups[route.node]
        n_local, local_rank = len(route.node), route.node.index(dist.get_rank())
        average.copy_(x)
        size = -(-x.numel() // (SEGMENTS * n_local)) * n_local
        segments = [s.view(n_local, -1) for s in average.split(size)]
        # Not reduce_scatter and all_gather: gloo takes 4 and 8 times as long for them.
        to_shards = [
            [dist.reduce(shards[i], route.node[i], group=node, async_op=True) for i in range(n_local)]
            for shards in segments
        ]
        to_all = []
        for shards, works in zip(segments, to_shards, strict=True):
            _wait(works)
            mine = shards[local_rank].mul_(1 / n_local)
            list(self._pair(mine, mine, route))
            to_all.append([dist.broadcast(shards[i], route.node[i], group=node, async_op=True) for i in range(n_local)])
        for i, works in enumerate(to_all):
            _wait(works)
            yield slice(i * size, (i + 1) * size)

    def _group(self, x: Tensor, average: Tensor, route: Route) -> Iterator[slice]:
        torch.mul(x, 1 / len(route.ranks), out=average)
        dist.all_reduce(average, group=self._groups[route.ranks])
        yield slice(None)


def _wait(works: list[Any]) -> None:
    for work in works:
        work.wait()  # exactly once: a second wait of a gloo send or receive hangs


class _Thread:
    """Runs one function at a time in a thread; gloo's calls release the interpreter while they wait."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gossip")
        self._running: Future[None] | None = None
        self._arrived: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()  # None ends it

    def run(self, pieces: Iterator[Piece]) -> None:
        self._running = self._executor.submit(self._run, pieces)

    def _run(self, pieces: Iterator[Piece]) -> None:
        try:
            for piece in pieces:
                self._arrived.put(piece)
        finally:
            self._arrived.put(None)

    def arrivals(self) -> Iterator[Piece]:
        """Yield each piece as soon as it is there. Raises what the function raised."""
        yield from iter(self._arrived.get, None)
        self.wait()

    def wait(self) -> None:
        if self._running is not None:
            self._running.result()


class _CudaStream:
    """Queues a function's kernels and collectives on a stream of its own; no call blocks the host."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pieces: list[Piece] = []

    def run(self, pieces: Iterator[Piece]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._pieces = list(pieces)

    def arrivals(self) -> Iterator[Piece]:
        self.wait()
        yield from self._pieces

    def wait(self) -> None:
        torch.cuda.current_stream().wait_stream(self._stream)
