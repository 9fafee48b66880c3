"""Schedules of gossip averaging: which ranks average their parameters at which step. No torch and no processes.

A topology repeats a list of rounds. In a round every worker averages, with equal weights, over a tuple of ranks that
contains itself. These tuples are disjoint groups, except in `exp` on a world that is not a power of two: there they
form a ring of shifts, in which a worker receives from one rank and sends to another.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Round = tuple[tuple[int, ...], ...]  # entry i: ranks that worker i averages, sorted, i included


@dataclass(frozen=True)
class Topology:
    name: str
    world_size: int  # n
    local_world_size: int  # workers per node; rank // local_world_size is the node
    rounds: tuple[Round, ...]

    @property
    def period(self) -> int:
        """Number of rounds after which the schedule repeats."""
        return len(self.rounds)

    def group(self, step: int, rank: int) -> tuple[int, ...]:
        """Ranks whose parameters `rank` averages at `step`, itself included, sorted.

        Raises:
            ValueError: step is negative.
        """
        if step < 0:
            raise ValueError(f"step = {step} is negative")
        return self.rounds[step % self.period][rank]

    def matrix(self, step: int) -> NDArray[np.float64]:
        """Mixing matrix W of `step`, (n, n): row i holds the weights that worker i applies. Doubly stochastic."""
        w = np.zeros((self.world_size, self.world_size))
        for rank in range(self.world_size):
            group = self.group(step, rank)
            w[rank, list(group)] = 1 / len(group)
        return w


def build_topology(name: str, world_size: int, local_world_size: int) -> Topology:
    """Return the topology `name` on world_size workers, local_world_size of them on each node.

    Raises:
        ValueError: there is no such topology, or it does not fit the world.
    """
    if name not in _ROUNDS:
        raise ValueError(f'train.topology = "{name}" is not one of {", ".join(_ROUNDS)}')
    if world_size < 1 or local_world_size < 1 or world_size % local_world_size:
        raise ValueError(f"{world_size} workers cannot be {local_world_size} on every node")
    return Topology(name, world_size, local_world_size, tuple(_ROUNDS[name](world_size, local_world_size)))


def default_topology(world_size: int, local_world_size: int) -> str:
    """Name of the topology for a run that names none: alternating-exp-ring on an even number of nodes, else exp."""
    return "exp" if world_size // local_world_size % 2 else "alternating-exp-ring"


def _complete(n: int, _: int) -> list[Round]:
    return [_groups(n, [tuple(range(n))])]


def _ring(n: int, _: int) -> list[Round]:
    """Edges (s, s+1), (s+2, s+3) ... of a ring from s on; a cycle of odd length needs a third round."""
    starts = [0] if n == 1 else [0, 1] if n % 2 == 0 else [0, 1, -1]
    return [_groups(n, [((s + 2 * k) % n, (s + 2 * k + 1) % n) for k in range(n // 2)]) for s in starts]


def _exp(n: int, _: int) -> list[Round]:
    """Hops of 1, 2, 4 ... ranks: between pairs if n is a power of two, else in one direction (Ying et al. 2021,
    "Exponential Graph is Provably Efficient for Decentralized Deep Training")."""
    hops = [2**r for r in range((n - 1).bit_length())]
    if _is_power_of_two(n):
        return [_groups(n, [(i, i ^ hop) for i in range(n)]) for hop in hops or [0]]
    return [tuple(_sorted({i, (i - hop) % n}) for i in range(n)) for hop in hops]


def _alternating_exp_ring(n: int, local_world_size: int) -> list[Round]:
    """Even pairs of nodes average inside each node at step 2r and over both nodes at step 2r + 1, odd pairs vice versa.
    So every node sends in every second step, and in every step half of the nodes do."""
    n_nodes = n // local_world_size
    if n_nodes % 2:
        raise ValueError(
            f'train.topology = "alternating-exp-ring" needs an even number of nodes; this run has {n_nodes} '
            f'{"node" if n_nodes == 1 else "nodes"} x {local_world_size} workers: use "exp", "ring" or "complete"'
        )
    nodes = [tuple(range(a * local_world_size, (a + 1) * local_world_size)) for a in range(n_nodes)]
    rounds: list[Round] = []
    for r, pairs in enumerate(_node_pairs(n_nodes)):
        for half in (0, 1):
            groups: list[tuple[int, ...]] = []
            for number, (a, b) in enumerate(pairs, start=r * len(pairs)):  # counted through all rounds
                groups += [nodes[a], nodes[b]] if number % 2 == half else [nodes[a] + nodes[b]]
            rounds.append(_groups(n, groups))
    return rounds


def _node_pairs(n_nodes: int) -> list[list[tuple[int, int]]]:
    """Pairs of nodes, by round, that hold every node once: a and a XOR 2^r if the number of nodes is a power of two.

    On any other even number, for which no schedule is published, even nodes meet the odd node 1, 3, 7 ... after them.
    A round multiplies the distance to the mean by at most 0.71 on up to 48 nodes (pairs along a ring of 48: 0.99).
    """
    if _is_power_of_two(n_nodes):
        return [[(a, a ^ 2**r) for a in range(n_nodes) if a < a ^ 2**r] for r in range(n_nodes.bit_length() - 1)]
    hops = [2**r - 1 for r in range(1, n_nodes.bit_length())]
    return [[(a, (a + hop) % n_nodes) for a in range(0, n_nodes, 2)] for hop in hops]


_ROUNDS: dict[str, Callable[[int, int], list[Round]]] = {
    "complete": _complete,
    "exp": _exp,
    "ring": _ring,
    "alternating-exp-ring": _alternating_exp_ring,
}


def _groups(n: int, groups: list[tuple[int, ...]]) -> Round:
    """Return the round of these groups; a rank that is in no group keeps its own parameters."""
    of_rank: list[tuple[int, ...]] = [(i,) for i in range(n)]
    for group in map(_sorted, groups):
        for rank in group:
            of_rank[rank] = group
    return tuple(of_rank)


def _sorted(ranks: tuple[int, ...] | set[int]) -> tuple[int, ...]:
    return tuple(sorted(set(ranks)))


def _is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0
