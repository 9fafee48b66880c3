"""One averaging of flat buffers with the neighbours, carried out beside the computation.

An exchange is written as ordinary blocking calls, one after the other, and run in the background: by a thread under
gloo, on a CUDA stream of its own under NCCL. It hands over one piece after the other, so that when a link is what a
step waits for, only the last piece is left to be copied at the end. How a round travels is decided here and nowhere
else:

* Pairs and shifts by send and receive, in chunks of which some are always under way. That fills a link in both
  directions at once, as an all-reduce in a group of two would (one large send and receive take turns: half of it), and
  needs no process group, which costs threads under gloo and half a gigabyte under NCCL.
* The workers of two whole nodes by shards: every worker sums one inside its node, averages it as a pair with its
  counterpart on the other node, and hands it out inside the node. So x.numel() elements leave a node, where an
  all-reduce over both would send nearly twice that.
* Any other group by all-reduce.
"""

import queue
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from decent.topology import Topology
from decent.world import group_timeout

CHUNK_BYTES = {"gloo": 2**20, "nccl": 2**23}  # of what a pair sends at once, before rounding
CHUNKS_UNDER_WAY = 8
SEGMENTS = 8  # of what two nodes average


Piece = tuple[int, slice]  # of the buffer with this index


@dataclass(frozen=True)
class Route:
    """How one worker's averaging of one round travels."""

    kind: Literal["stay", "pair", "two_nodes", "group"]
    group: tuple[int, ...]  # ranks that are averaged, sorted
    send_to: int | None = None  # pair: the rank that needs ours; two_nodes: our counterpart on the other node
    receive_from: int | None = None  # pair: the rank that we need, send_to unless the round is directed
    node: tuple[int, ...] = ()  # two_nodes: the workers of this node


def plan_route(topology: Topology, step: int, rank: int) -> Route:
    """Pure: the route of `rank` at `step`."""
    group = topology.group(step, rank)
    local = topology.local_world_size
    if len(group) == 1:
        return Route("stay", group)
    if len(group) == 2:
        (source,) = set(group) - {rank}
        target = source
        if topology.group(step, source) != group:  # a directed round
            (target,) = {i for i in range(topology.world_size) if rank in topology.group(step, i)} - {rank}
        return Route("pair", group, send_to=target, receive_from=source)
    if len(group) == 2 * local and len({i // local for i in group}) == 2:
        node = tuple(i for i in group if i // local == rank // local)
        (counterpart,) = {i for i in group if i % local == rank % local} - {rank}
        return Route("two_nodes", group, send_to=counterpart, receive_from=counterpart, node=node)
    return Route("group", group)


def plan_groups(topology: Topology) -> list[tuple[int, ...]]:
    """Pure: the process groups that all ranks must create, in this order."""
    routes = [plan_route(topology, step, i) for step in range(topology.period) for i in range(topology.world_size)]
    return sorted({r.node for r in routes if r.kind == "two_nodes"} | {r.group for r in routes if r.kind == "group"})


class Exchange:
    """Averages `buffers` over the groups of a topology: `start`, then `finish_`.

    A buffer is 1-D and divisible by the local world size. comm_dtype: what pairs send, Q(x), is rounded to it, and the
    average is x_i + (Q(x_j) - Q(x_i)) / 2, so that rounding moves no mean. snapshot: an exchange works on a copy, and
    buffers may change meanwhile; without, nothing may write to them between `start` and `wait` or `finish_`. timeout_s:
    after which a peer that does not answer is an error; None is PyTorch's default.

    Raises:
        ValueError: a round of `topology` cannot be rounded to comm_dtype.
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
        self._rank = dist.get_rank()
        self._routes = [plan_route(topology, step, self._rank) for step in range(topology.period)]
        self._comm_dtype = comm_dtype
        self._chunk_bytes = CHUNK_BYTES[dist.get_backend()]
        self._buffers = buffers
        self._sources = [b.clone() for b in buffers] if snapshot else buffers  # what is sent
        self._averages = [torch.empty_like(b) for b in buffers]  # after wait(): W x, or W s - s of snapshots s
        # gloo matches calls by their order, which a thread of its own cannot share with the rest of the program.
        timeout = group_timeout(timeout_s, buffers[0].device)
        gloo = dist.get_backend() == "gloo"
        self._everyone: Any = dist.new_group(timeout=timeout) if gloo else dist.group.WORLD
        # All ranks create all groups in the same order, also those that they are not in.
        self._groups: dict[tuple[int, ...], Any] = {
            ranks: self._everyone if len(ranks) == topology.world_size else dist.new_group(list(ranks), timeout)
            for ranks in plan_groups(topology)
        }
        self._route: Route | None = None  # of the exchange in flight
        self._background = _CudaStream(buffers[0].device) if buffers[0].is_cuda else _Thread()

    @property
    def snapshots(self) -> list[Tensor]:
        """What the exchange in flight sends, one for each buffer; none where it sends the buffers themselves."""
        return [] if self._sources is self._buffers else self._sources

    @torch.no_grad()
    def start(self, step: int, snapshots: list[Tensor] | None = None) -> None:
        """Starts the averaging of `step` and returns at once. snapshots: what to send, not the buffers of now."""
        self._route = route = self._routes[step % len(self._routes)]
        if route.kind == "stay":
            return
        if self._sources is not self._buffers:
            for source, x in zip(self._sources, snapshots or self._buffers, strict=True):
                n = min(source.numel(), x.numel())  # the padding at the end depends on the workers of a node
                source[:n].copy_(x[:n])
        self._background.run(lambda: self._average(route))

    @property
    def peers(self) -> tuple[int, ...]:
        """The ranks that the exchange in flight waits for, sorted."""
        if self._route is None:
            return ()
        ranks = {*self._route.group, self._route.send_to}
        return tuple(sorted(rank for rank in ranks if rank is not None and rank != self._rank))

    def wait(self) -> None:
        """Until the averages are there and the buffers are free again. Raises what the exchange raised. Idempotent."""
        self._background.wait()

    @torch.no_grad()
    def finish_(self) -> None:
        """x <- W x, or x <- x + W s - s of the snapshot s, once for each start; nothing when none was started."""
        if self._route is None or self._route.kind == "stay":
            return
        for i, piece in self._background.arrivals():
            x, source, average = (tensors[i][piece] for tensors in (self._buffers, self._sources, self._averages))
            if self._sources is self._buffers:
                x.copy_(average)
            else:
                x.add_(average.sub_(source))
        self._route = None

    @torch.no_grad()
    def _average(self, route: Route) -> Iterator[Piece]:
        """Fills the averages and yields their parts that are final."""
        carry = {"pair": self._pair, "two_nodes": self._two_nodes, "group": self._group}[route.kind]
        with record_function(f"gossip.{route.kind}"):
            for i, (source, average) in enumerate(zip(self._sources, self._averages, strict=True)):
                for piece in carry(source, average, route):
                    yield i, piece

    def _pair(self, x: Tensor, average: Tensor, route: Route) -> Iterator[slice]:
        """average <- x + (Q(theirs) - Q(x)) / 2, or (x + theirs) / 2 without rounding. May be in place."""
        size = self._chunk_bytes // x.element_size()
        chunks = [slice(begin, begin + size) for begin in range(0, x.numel(), size)]
        under_way = deque(self._start_chunks(chunks[:CHUNKS_UNDER_WAY], x, average, route))
        for i, chunk in enumerate(chunks, CHUNKS_UNDER_WAY):
            under_way.popleft()()
            under_way += self._start_chunks(chunks[i : i + 1], x, average, route)
            yield chunk

    def _start_chunks(self, chunks: list[slice], x: Tensor, average: Tensor, route: Route) -> list[Callable[[], None]]:
        """What ends each of them."""
        sent = [x[c] if self._comm_dtype is None else x[c].to(self._comm_dtype) for c in chunks]
        # Straight to its place where that is free: no memory beside the averages.
        is_free = self._comm_dtype is None and average is not x
        theirs = [average[c] if is_free else torch.empty_like(t) for t, c in zip(sent, chunks, strict=True)]
        # Receives first: under gloo each tells the peer that it may send, and must not queue behind our own chunks.
        ops = [dist.P2POp(dist.irecv, t, route.receive_from, self._everyone) for t in theirs]
        ops += [dist.P2POp(dist.isend, t, route.send_to, self._everyone) for t in sent]
        works = dist.batch_isend_irecv(ops) if ops else []  # gloo: one for each; NCCL: one for all

        @torch.no_grad()
        def finish(i: int) -> None:
            _wait(works[i :: len(chunks)])
            out = average[chunks[i]]
            if self._comm_dtype is None:
                torch.add(sent[i], theirs[i], out=out).mul_(0.5)  # symmetric: both of a pair get the same bits
            else:
                torch.add(x[chunks[i]], theirs[i].to(x.dtype).sub_(sent[i]), alpha=0.5, out=out)

        return [partial(finish, i) for i in range(len(chunks))]

    def _two_nodes(self, x: Tensor, average: Tensor, route: Route) -> Iterator[slice]:
        """In segments, so that the nodes' insides work while the link between them does."""
        node = self._groups[route.node]
        n_local, local_rank = len(route.node), route.node.index(self._rank)
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
            for _ in self._pair(mine, mine, route):
                pass
            to_all.append([dist.broadcast(shards[i], route.node[i], group=node, async_op=True) for i in range(n_local)])
        for i, works in enumerate(to_all):
            _wait(works)
            yield slice(i * size, (i + 1) * size)

    def _group(self, x: Tensor, average: Tensor, route: Route) -> Iterator[slice]:
        torch.mul(x, 1 / len(route.group), out=average)
        dist.all_reduce(average, group=self._groups[route.group])
        yield slice(None)


def _wait(works: list[Any]) -> None:
    for work in works:
        work.wait()  # exactly once: a second wait of a gloo send or receive hangs


class _Thread:
    """Runs one function at a time in a thread; gloo's calls release the interpreter while they wait."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gossip")
        self._running: Future[None] | None = None
        self._arrived: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()  # None: there is no more

    def run(self, pieces: Callable[[], Iterator[Piece]]) -> None:
        self._running = self._executor.submit(self._run, pieces)

    def _run(self, pieces: Callable[[], Iterator[Piece]]) -> None:
        try:
            for piece in pieces():
                self._arrived.put(piece)
        finally:
            self._arrived.put(None)

    def arrivals(self) -> Iterator[Piece]:
        """Each piece as soon as it is there. Raises what the function raised."""
        while (piece := self._arrived.get()) is not None:
            yield piece
        self.wait()

    def wait(self) -> None:
        if self._running is not None:
            self._running.result()


class _CudaStream:
    """Queues a function's kernels and collectives on a stream of its own; no call blocks the host."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pieces: list[Piece] = []

    def run(self, pieces: Callable[[], Iterator[Piece]]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._pieces = list(pieces())

    def arrivals(self) -> Iterator[Piece]:
        self.wait()
        yield from self._pieces

    def wait(self) -> None:
        torch.cuda.current_stream().wait_stream(self._stream)
