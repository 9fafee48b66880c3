"""Routes and groups of rounds, planned without processes. tests/multirank/test_decent_dp.py tests what travels."""

from decent import build_topology
from decent.exchange import plan_groups, plan_route


def test_rounds_over_two_nodes_travel_by_shards() -> None:
    route = plan_route(build_topology("alternating-exp-ring", 8, 4), 1, 5)
    assert (route.kind, route.node, route.send_to, route.receive_from) == ("two_nodes", (4, 5, 6, 7), 1, 1)


def test_directed_rounds_send_one_way() -> None:
    route = plan_route(build_topology("exp", 6, 6), 1, 0)
    assert (route.kind, route.receive_from, route.send_to) == ("pair", 4, 2)


def test_worker_without_a_neighbour_stays() -> None:
    assert plan_route(build_topology("ring", 3, 3), 0, 2).kind == "stay"


def test_pairs_need_no_process_group() -> None:
    assert plan_groups(build_topology("exp", 8, 4)) == []
    assert plan_groups(build_topology("exp", 6, 2)) == []


def test_groups_are_planned_in_sorted_order_without_repetition() -> None:
    assert plan_groups(build_topology("alternating-exp-ring", 8, 2)) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert plan_groups(build_topology("complete", 6, 2)) == [(0, 1, 2, 3, 4, 5)]
