"""The laws of the schedules, for every topology and world that the text allows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decent.topology import Topology, build_topology, default_topology


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    name = draw(st.sampled_from(["complete", "exp", "ring", "alternating-exp-ring"]))
    local = draw(st.integers(1, 5))
    nodes = draw(st.integers(1, 10).map(lambda half: 2 * half) if name == "alternating-exp-ring" else st.integers(1, 8))
    return build_topology(name, nodes * local, local)


@given(topologies(), st.integers(0, 100))
def test_every_mixing_matrix_is_doubly_stochastic(topology: Topology, step: int) -> None:
    w = topology.matrix(step)
    assert w.shape == (topology.world_size, topology.world_size)
    assert (w >= 0).all()
    np.testing.assert_allclose(w.sum(axis=0), 1, atol=1e-12)
    np.testing.assert_allclose(w.sum(axis=1), 1, atol=1e-12)


def is_directed(topology: Topology) -> bool:
    return topology.name == "exp" and topology.world_size & (topology.world_size - 1) != 0


@given(topologies(), st.integers(0, 100))
def test_rounds_are_disjoint_groups_unless_directed(topology: Topology, step: int) -> None:
    ranks = range(topology.world_size)
    groups = [topology.group(step, rank) for rank in ranks]
    assert all(rank in group and list(group) == sorted(set(group)) for rank, group in enumerate(groups))
    if not is_directed(topology):
        assert sorted(rank for group in set(groups) for rank in group) == list(ranks)


@given(topologies(), st.integers(0, 50))
def test_schedule_repeats_after_its_period(topology: Topology, step: int) -> None:
    np.testing.assert_array_equal(topology.matrix(step), topology.matrix(step + topology.period))


def product_of_period(topology: Topology, first: int = 0) -> np.ndarray:
    w = np.eye(topology.world_size)
    for step in range(first, first + topology.period):
        w = topology.matrix(step) @ w
    return w


@given(topologies(), st.integers(0, 20))
def test_exact_mean_after_the_period(topology: Topology, first: int) -> None:
    n_nodes = topology.world_size // topology.local_world_size
    exact = {
        "complete": True,
        "exp": not is_directed(topology),
        "ring": topology.world_size <= 2,
        "alternating-exp-ring": first % topology.period == 0 and n_nodes & (n_nodes - 1) == 0,
    }[topology.name]
    if exact:
        np.testing.assert_allclose(product_of_period(topology, first), 1 / topology.world_size, atol=1e-12)


@given(topologies())
def test_workers_reach_consensus_in_the_long_run(topology: Topology) -> None:
    w = product_of_period(topology)
    deviation = np.linalg.matrix_power(w, 400) - 1 / topology.world_size
    assert np.abs(deviation).max() < 1e-3


@pytest.mark.parametrize(
    ("name", "n_nodes", "period"),
    [
        *(("exp", n, rounds) for n, rounds in [(1, 1), (2, 1), (8, 3), (16, 4), (3, 2), (6, 3), (1024, 10)]),
        *(("alternating-exp-ring", n, 2 * rounds) for n, rounds in [(2, 1), (4, 2), (16, 4), (6, 2), (10, 3), (48, 5)]),
    ],
)
def test_exp_has_log2_n_rounds_and_alternating_takes_two_steps_each(name: str, n_nodes: int, period: int) -> None:
    assert build_topology(name, n_nodes, 1).period == period


def test_exp_on_six_workers_receives_from_hops_of_one_two_four() -> None:
    topology = build_topology("exp", 6, 2)
    assert [topology.group(step, 0) for step in range(3)] == [(0, 5), (0, 4), (0, 2)]
    assert topology.matrix(0)[0, 5] == topology.matrix(0)[1, 0] == 0.5
    assert topology.matrix(0)[5, 0] == 0


@given(st.integers(3, 40))
def test_ring_uses_every_edge_in_a_period(n: int) -> None:
    """Two rounds if n is even; else three, in each of which one worker rests."""
    topology = build_topology("ring", n, 1)
    assert topology.period == 2 + n % 2
    assert all(sum(len(group) == 1 for group in round_) == n % 2 for round_ in topology.rounds)
    edges = {group for round_ in topology.rounds for group in round_ if len(group) == 2}
    assert edges == {tuple(sorted((i, (i + 1) % n))) for i in range(n)}


def test_alternating_exp_ring_on_four_nodes_is_the_published_schedule() -> None:
    topology = build_topology("alternating-exp-ring", 16, 4)

    def ranks(*nodes: int) -> tuple[int, ...]:
        return tuple(rank for node in nodes for rank in range(4 * node, 4 * node + 4))

    assert [set(round_) for round_ in topology.rounds] == [
        {ranks(0), ranks(1), ranks(2, 3)},
        {ranks(0, 1), ranks(2), ranks(3)},
        {ranks(0), ranks(2), ranks(1, 3)},
        {ranks(0, 2), ranks(1), ranks(3)},
    ]


@given(st.integers(1, 20).map(lambda half: 2 * half), st.integers(1, 4))
def test_half_the_nodes_send_in_each_step_of_alternating(n_nodes: int, local: int) -> None:
    topology = build_topology("alternating-exp-ring", n_nodes * local, local)
    for step in range(0, topology.period, 2):
        first, second = (
            [len(topology.group(s, node * local)) == 2 * local for node in range(n_nodes)] for s in (step, step + 1)
        )
        assert all(a != b for a, b in zip(first, second, strict=True))
        assert abs(sum(first) - n_nodes / 2) <= 1  # they send in pairs


@given(st.integers(1, 24).map(lambda half: 2 * half))
def test_alternating_exp_ring_contracts_on_any_even_number_of_nodes(n_nodes: int) -> None:
    topology = build_topology("alternating-exp-ring", n_nodes, 1)
    eigenvalues = np.linalg.eigvals(product_of_period(topology) - 1 / n_nodes)
    assert np.abs(eigenvalues).max() < 0.75 ** (topology.period / 2)


@pytest.mark.parametrize(("n_nodes", "name"), [(1, "exp"), (2, "alternating-exp-ring"), (3, "exp")])
def test_default_topology_fits_the_number_of_nodes(n_nodes: int, name: str) -> None:
    for local in (1, 4):
        assert default_topology(n_nodes * local, local) == name


@pytest.mark.parametrize(
    ("name", "n", "local", "message"),
    [
        ("star", 4, 1, '"star" is not one of complete, exp, ring, alternating-exp-ring'),
        ("alternating-exp-ring", 4, 4, '1 node x 4 workers: use "exp", "ring" or "complete"'),
        ("alternating-exp-ring", 6, 2, "needs an even number of nodes; this run has 3 nodes x 2 workers"),
        ("exp", 6, 4, "6 workers cannot be 4 on every node"),
        ("exp", 0, 1, "0 workers"),
    ],
)
def test_topology_that_does_not_fit_is_refused(name: str, n: int, local: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_topology(name, n, local)


def test_negative_step_is_an_error() -> None:
    with pytest.raises(ValueError, match="step = -1"):
        build_topology("ring", 4, 1).group(-1, 0)


@pytest.mark.parametrize("name", ["exp", "ring", "alternating-exp-ring", "complete"])
@pytest.mark.timeout(10)
def test_a_thousand_workers_are_planned_in_seconds(name: str) -> None:
    assert len(build_topology(name, 1024, 4).group(5, 1000)) >= 2
