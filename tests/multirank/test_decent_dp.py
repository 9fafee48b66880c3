"""DecentDP in real gloo processes against the dense simulation in one process, and what its users rely on."""

import functools
import math
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from decent import DecentDP, PeerError, World, build_topology, exchange
from decent.exchange import plan_groups, plan_route
from decent.simulate import simulate, stack_parameters
from optim import AccumAdamW
from tests.multirank.workers import WorkerError, run_workers

pytestmark = pytest.mark.dist

N_STEPS, N_MICRO_BATCHES, CLIP, EVALUATE_AT = 14, 2, 0.5, 5
WORLDS = [(1, 1), (2, 2), (2, 1), (3, 3), (4, 4), (4, 2), (6, 2), (6, 1), (8, 4), (8, 2)]  # (n, workers per node)


class Net(nn.Module):
    """Small, with tied weights, and sizes that leave gaps between aligned parameters."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(11, 7)
        nn.init.normal_(self.table.weight, std=0.2)  # as small as those of GPT-2: 1e-6 is some float32 roundings
        self.hidden = nn.Linear(7, 7)

    def forward(self, idx: Tensor) -> Tensor:
        return torch.tanh(self.hidden(self.table(idx))) @ self.table.weight.T


def backward(module: nn.Module, rank: int, step: int) -> None:
    """Adds the worker's own gradient of the step, in micro-batches."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    for _ in range(N_MICRO_BATCHES):
        idx = torch.randint(11, (5, 3), generator=generator)
        loss = nn.functional.cross_entropy(module(idx).flatten(0, 1), idx.roll(1, 0).flatten())
        (loss / N_MICRO_BATCHES).backward()


def make_optimizer(name: str, module: nn.Module) -> torch.optim.Optimizer:
    if name == "accumadamw":
        return AccumAdamW(module.parameters(), lr=3e-3, accum_steps=3)
    return torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.1)


def parameters_of(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


class Case(NamedTuple):
    topology: str
    optimizer: str = "accumadamw"
    comm_dtype: torch.dtype | None = None
    gossip_every: int = 1


def train(case: Case, evaluate_at: int | None) -> dict[str, Any]:
    world = World.from_env()
    module = Net(seed=world.rank)  # DecentDP has to make them equal
    model = DecentDP(module, case.topology, comm_dtype=case.comm_dtype, gossip_every=case.gossip_every)
    optimizer = make_optimizer(case.optimizer, module)
    seen: dict[str, Any] = {"initial": parameters_of(module)}
    for step in range(N_STEPS):
        optimizer.zero_grad()
        backward(model, world.rank, step)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        model.mix()
        optimizer.step()
        model.exchange()
        if step == evaluate_at:
            own = parameters_of(module)
            seen["consensus_distance"] = model.consensus_distance()
            with model.averaged():
                seen["mean"] = parameters_of(module)
            assert all(torch.equal(a, b) for a, b in zip(own, module.parameters(), strict=True))
    seen["final"] = parameters_of(module)
    return seen


def train_all(cases: list[Case]) -> list[dict[str, Any]]:
    return [train(case, EVALUATE_AT) for case in cases]


def cases_of(world: tuple[int, int]) -> list[Case]:
    n, local = world
    topologies = ["complete", "exp", "ring"]
    if n // local % 2 == 0:
        topologies.append("alternating-exp-ring")
    options = [(None, 3)]
    if local <= 2:  # a node's mean of more has other roundings than the simulation's, and Q makes them large
        options += [(torch.bfloat16, 1), (torch.bfloat16, 3)]
    return [
        *(Case(topology) for topology in topologies),
        Case("exp", "adamw"),
        *(Case(topologies[-1], "accumadamw", *option) for option in options),
    ]


@functools.cache
def processes(world: tuple[int, int]) -> dict[Case, list[dict[str, Any]]]:
    """What each rank saw, by case: one launch of n processes serves all cases of a world."""
    by_rank = run_workers(world[0], train_all, cases_of(world), local_world_size=world[1])
    return {case: [ranks[i] for ranks in by_rank] for i, case in enumerate(cases_of(world))}


@functools.cache
def dense(world: tuple[int, int], case: Case, n_steps: int) -> list[nn.Module]:
    modules: list[nn.Module] = [Net(seed=0) for _ in range(world[0])]
    simulate(
        modules,
        [make_optimizer(case.optimizer, module) for module in modules],
        build_topology(case.topology, *world),
        backward,
        n_steps=n_steps,
        grad_norm_clip=CLIP,
        comm_dtype=case.comm_dtype,
        gossip_every=case.gossip_every,
    )
    return modules


ALL = [pytest.param(world, case, id=f"{world}-{case}") for world in WORLDS for case in cases_of(world)]


@pytest.mark.parametrize(("world", "case"), ALL)
def test_processes_reach_the_parameters_of_the_dense_simulation(world: tuple[int, int], case: Case) -> None:
    modules = dense(world, case, N_STEPS)
    for rank, seen in enumerate(processes(world)[case]):
        for found, wanted in zip(seen["final"], modules[rank].parameters(), strict=True):
            torch.testing.assert_close(found, wanted.detach(), atol=1e-6, rtol=0)
        assert not all(map(torch.equal, seen["final"], seen["initial"]))


@pytest.mark.parametrize(("world", "case"), ALL)
def test_averaged_holds_the_mean_of_all_workers_and_the_same_bits_on_each(world: tuple[int, int], case: Case) -> None:
    xs = stack_parameters(dense(world, case, EVALUATE_AT + 1))  # each (n, *shape)
    distance = math.sqrt(sum(((x - x.mean(0)) ** 2).sum().item() for x in xs) / world[0])
    ranks = processes(world)[case]
    for seen in ranks:
        assert all(map(torch.equal, seen["mean"], ranks[0]["mean"]))
        for found, x in zip(seen["mean"], xs, strict=True):
            torch.testing.assert_close(found.double(), x.mean(0), atol=1e-6, rtol=0)
        assert seen["consensus_distance"] == pytest.approx(distance, abs=1e-5)


def test_workers_start_equal_with_rank_0s_parameters() -> None:
    for seen in processes((4, 2))[Case("exp")]:
        assert all(map(torch.equal, seen["initial"], [p.detach() for p in Net(seed=0).parameters()]))


def final_with_and_without_evaluation() -> bool:
    runs = [train(Case("alternating-exp-ring", "accumadamw", torch.bfloat16), evaluate_at) for evaluate_at in (None, 3)]
    return all(map(torch.equal, runs[0]["final"], runs[1]["final"]))


def test_evaluation_does_not_change_a_bit_of_training() -> None:
    assert all(run_workers(4, final_with_and_without_evaluation, local_world_size=2))


def exchange_a_thousand_times(topology: str) -> tuple[Tensor, Tensor, float]:
    exchange.SEGMENTS = 2  # not so many messages, of a few bytes each
    module = nn.Linear(40, 40, bias=False)
    model = DecentDP(module, topology, comm_dtype=torch.bfloat16)
    with torch.no_grad():
        module.weight.copy_(torch.randn(40, 40, generator=torch.Generator().manual_seed(World.from_env().rank)))
    before, distance = module.weight.detach().clone(), model.consensus_distance()
    for _ in range(1000):
        model.exchange()
        model.mix()
    return before, module.weight.detach().clone(), model.consensus_distance() / distance


@pytest.mark.parametrize(
    ("topology", "world"), [("exp", (4, 4)), ("exp", (3, 3)), ("ring", (3, 3)), ("alternating-exp-ring", (4, 2))]
)
def test_a_thousand_rounded_exchanges_keep_the_mean_and_reach_consensus(topology: str, world: tuple[int, int]) -> None:
    ranks = run_workers(world[0], exchange_a_thousand_times, topology, local_world_size=world[1])
    before, after = (torch.stack([r[i] for r in ranks]).double().mean(0) for i in (0, 1))  # type: ignore[misc]
    # Values of about 1, in float32: one rounding is 6e-8 and they add up to a random walk. One of bfloat16 is 2e-3.
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    assert max(r[2] for r in ranks) < 0.01  # of the distance before


# What goes wrong in other wrappers of this kind ---------------------------------------------------------------------


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    backward(model, rank, step)
    model.mix()  # type: ignore[operator]
    optimizer.step()
    model.exchange()  # type: ignore[operator]


def first_update_after_zero_grad() -> bool:
    module = Net(0)
    model = DecentDP(module, "exp")
    optimizer = make_optimizer("accumadamw", module)
    before = parameters_of(module)
    optimizer.zero_grad()
    one_step(model, optimizer, 0, 0)
    return all(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_the_first_gradient_moves_the_parameters() -> None:
    assert all(run_workers(2, first_update_after_zero_grad))


def forward_without_backward_on_rank_0() -> list[Tensor]:
    rank = World.from_env().rank
    module = Net(0)
    model = DecentDP(module, "ring")
    optimizer = make_optimizer("adamw", module)
    for step in range(4):
        optimizer.zero_grad()
        if rank == 0:
            model(torch.zeros(1, 1, dtype=torch.long))
        one_step(model, optimizer, rank, step)
    return parameters_of(module)


def test_a_forward_without_backward_does_not_shift_the_topology() -> None:
    modules: list[nn.Module] = [Net(0) for _ in range(4)]
    optimizers = [make_optimizer("adamw", module) for module in modules]
    simulate(modules, optimizers, build_topology("ring", 4, 4), backward, n_steps=4)
    for found, module in zip(run_workers(4, forward_without_backward_on_rank_0), modules, strict=True):
        for a, b in zip(found, module.parameters(), strict=True):
            torch.testing.assert_close(a, b.detach(), atol=1e-6, rtol=0)


class LateLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = nn.Linear(3, 3), nn.Linear(3, 3)
        self.use_late = False

    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.early(x)) if self.use_late else self.early(x)


def parameter_unused_in_the_first_step() -> Tensor:
    rank = World.from_env().rank
    module = LateLayer()
    model = DecentDP(module, "complete")
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    with torch.no_grad():
        module.late.weight.fill_(1.0)
    for step in range(3):
        optimizer.zero_grad()
        module.use_late = step > 0
        model(torch.full((1, 3), 1.0 + rank)).sum().backward()
        model.mix()
        optimizer.step()
        model.exchange()
    model.mix()
    return module.late.weight.detach().clone()


def test_a_parameter_unused_in_the_first_step_is_trained_and_mixed_later() -> None:
    first, second = run_workers(2, parameter_unused_in_the_first_step)
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.ones(3, 3))


def averaged_before_the_first_step() -> bool:
    module = Net(World.from_env().rank)
    model = DecentDP(module, "exp")
    own = parameters_of(module)
    with model.averaged():
        inside = parameters_of(module)
    return all(torch.allclose(a, b) for a, b in zip(own, inside, strict=True)) and model.consensus_distance() < 1e-6


def test_evaluation_before_the_first_step_is_legal() -> None:
    assert all(run_workers(2, averaged_before_the_first_step))


def compiled_wrapper() -> list[list[Tensor]]:
    found = []
    for compile_it in (False, True):
        module = Net(0)
        model: Any = DecentDP(module, "exp")
        if compile_it:
            model = torch.compile(model, backend="aot_eager")
        optimizer = make_optimizer("adamw", module)
        for step in range(3):
            optimizer.zero_grad()
            one_step(model, optimizer, World.from_env().rank, step)
        found.append(parameters_of(module))
    return found


def test_compiling_the_wrapper_changes_nothing() -> None:
    for plain, compiled in run_workers(2, compiled_wrapper):
        for a, b in zip(plain, compiled, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def batch_norm_statistics() -> dict[str, Tensor]:
    rank = World.from_env().rank
    module = nn.BatchNorm1d(2)
    module.running_mean.fill_(rank)  # type: ignore[union-attr]
    model = DecentDP(module, "exp")
    seen = {"start": module.running_mean.clone()}  # type: ignore[union-attr]
    model(torch.full((4, 2), float(rank)))
    seen["own"] = module.running_mean.clone()  # type: ignore[union-attr]
    with model.averaged():
        seen["mean"] = module.running_mean.clone()  # type: ignore[union-attr]
    seen["after"] = module.running_mean.clone()  # type: ignore[union-attr]
    return seen


def test_statistics_start_equal_are_averaged_for_evaluation_and_restored() -> None:
    for rank, seen in enumerate(run_workers(2, batch_norm_statistics)):
        assert torch.equal(seen["start"], torch.zeros(2))
        torch.testing.assert_close(seen["own"], torch.full((2,), 0.1 * rank))
        torch.testing.assert_close(seen["mean"], torch.full((2,), 0.05))
        assert torch.equal(seen["after"], seen["own"])


def mixed_dtypes() -> list[Tensor]:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).to(torch.bfloat16))
    model = DecentDP(module, "complete")
    for p in module.parameters():
        p.data.fill_(World.from_env().rank)
    model.exchange()
    model.mix()
    return parameters_of(module)


def test_parameters_of_two_dtypes_keep_their_dtypes_and_mix() -> None:
    for found in run_workers(2, mixed_dtypes):
        assert [p.dtype for p in found] == [torch.float32] * 2 + [torch.bfloat16] * 2
        assert all((p == 0.5).all() for p in found)


def misuse(kind: str) -> str:
    module = Net(0)
    model = DecentDP(module, "exp")
    try:
        if kind == "complete":
            DecentDP(module, "complete", comm_dtype=torch.bfloat16)
        if kind == "never":
            DecentDP(module, "exp", gossip_every=0)
        if kind == "assign":
            module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()}, assign=True)
            model.mix()
        elif kind == "twice":
            model.exchange()
            model.exchange()
        elif kind == "inside":
            with model.averaged():
                model.mix()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "nothing was noticed"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("assign", "were replaced"),
        ("twice", "called twice"),
        ("inside", "not inside averaged()"),
        ("complete", 'topology "complete" cannot send torch.bfloat16'),
        ("never", "gossip_every = 0 must be at least 1"),
    ],
)
def test_misuse_is_refused_in_words(kind: str, message: str) -> None:
    (text,) = run_workers(1, misuse, kind)
    assert message in text


def exchange_before_rank_1(topology: str) -> bool:
    """Rank 1 starts its own only when rank 0 is through with the call."""
    rank = dist.get_rank()
    store = dist.distributed_c10d._get_default_store()
    model = DecentDP(Net(0), topology)
    for step in range(4):
        model.mix()
        if rank == 1:
            store.wait([f"rank 0 computes step {step}"], timedelta(seconds=20))
        model.exchange()
        if rank == 0:
            store.set(f"rank 0 computes step {step}", "")
    return True


@pytest.mark.parametrize("topology", ["complete", "exp", "alternating-exp-ring"])
def test_an_exchange_does_not_wait_for_the_neighbour(topology: str) -> None:
    assert all(run_workers(4, exchange_before_rank_1, topology, local_world_size=2))


def memory_kib(name: str) -> int:
    """VmRSS or VmHWM, its peak, of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0])


def copies_in_memory(comm_dtype: torch.dtype | None, gossip_every: int) -> float:
    """Beside the parameters, at the peak of some exchanges, as a multiple of them."""
    module = nn.Linear(4096, 4096, bias=False)  # 64 MiB
    alone = memory_kib("VmRSS")
    model = DecentDP(module, "exp", comm_dtype=comm_dtype, gossip_every=gossip_every)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what there is
    for _ in range(6):
        model.mix()
        model.exchange()
    model.mix()
    return (memory_kib("VmHWM") - alone) * 1024 / module.weight.nbytes


@pytest.mark.parametrize(
    ("comm_dtype", "gossip_every", "copies"), [(None, 1, 1), (torch.bfloat16, 1, 1), (torch.bfloat16, 2, 2)]
)
def test_an_exchange_takes_one_more_copy_of_the_parameters_and_two_with_snapshots(
    comm_dtype: torch.dtype | None, gossip_every: int, copies: int
) -> None:
    for found in run_workers(2, copies_in_memory, comm_dtype, gossip_every):
        assert copies <= found < copies + 0.8  # rounded chunks under way take 0.6, however large the parameters are


def lose_rank_1_in_step_3(how: str) -> str:
    rank = World.from_env().rank
    module = Net(0)
    model = DecentDP(module, "ring", timeout_s=2)
    optimizer = make_optimizer("adamw", module)
    try:
        for step in range(8):
            if rank == 1 and step == 3:
                if how == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(4)
                return "slept"
            one_step(model, optimizer, rank, step)
            if how == "hangs before an evaluation" and step == 3:
                model.consensus_distance()
    except PeerError as error:
        if how == "dies":
            raise  # for the harness to report, which cannot do without a rank
        return str(error)
    return "nothing was noticed"


@pytest.mark.fault
@pytest.mark.parametrize("how", ["hangs", "hangs before an evaluation"])
def test_a_worker_that_hangs_is_named_with_the_step_by_those_that_wait_for_it(how: str) -> None:
    found, _ = run_workers(2, lose_rank_1_in_step_3, how)
    assert found.startswith("step 4: waited in vain for rank 1: ")  # what rank 1 sent after step 2 was still there


@pytest.mark.fault
def test_a_worker_that_dies_is_named_with_the_step_by_those_that_wait_for_it() -> None:
    with pytest.raises(WorkerError, match=r"rank 0: (.|\n)*PeerError: step [34]: waited in vain for rank 1: "):
        run_workers(2, lose_rank_1_in_step_3, "dies")


# The plan: pure ------------------------------------------------------------------------------------------------------


def test_rounds_over_two_nodes_are_carried_by_shards() -> None:
    route = plan_route(build_topology("alternating-exp-ring", 8, 4), 1, 5)
    assert (route.kind, route.node, route.send_to, route.receive_from) == ("two_nodes", (4, 5, 6, 7), 1, 1)


def test_directed_rounds_send_one_way_and_lonely_workers_stay() -> None:
    route = plan_route(build_topology("exp", 6, 6), 1, 0)
    assert (route.kind, route.receive_from, route.send_to) == ("pair", 4, 2)
    assert plan_route(build_topology("ring", 3, 3), 0, 2).kind == "stay"


def test_pairs_need_no_process_group() -> None:
    assert plan_groups(build_topology("exp", 8, 4)) == []
    assert plan_groups(build_topology("exp", 6, 2)) == []


def test_groups_are_planned_in_sorted_order_without_repetition() -> None:
    assert plan_groups(build_topology("alternating-exp-ring", 8, 2)) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert plan_groups(build_topology("complete", 6, 2)) == [(0, 1, 2, 3, 4, 5)]


# The harness ---------------------------------------------------------------------------------------------------------


def fail_on_rank_1() -> None:
    if World.from_env().rank == 1:
        raise KeyError("on purpose")


def test_a_failing_worker_fails_the_test() -> None:
    with pytest.raises(WorkerError, match=r"rank 1: (.|\n)*on purpose"):
        run_workers(2, fail_on_rank_1)


def share_with_a_mistake_of(rank: int) -> str:
    """Of rank 0 in what it makes for the others, of another one before it takes part."""
    world = World.from_env()

    def fail() -> str:
        raise ValueError("no such thing")

    try:
        with world.raise_on_all_ranks():
            if world.rank == rank != 0:
                fail()
            world.once_per_node(fail if world.rank == rank else None)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("rank", [0, 1])
def test_the_mistake_of_one_worker_ends_all_with_its_message(rank: int) -> None:
    for message in run_workers(3, share_with_a_mistake_of, rank):
        assert message.startswith(f"rank {rank} on ")
        assert message.endswith(": no such thing")


def share_what_takes_longer_than_the_timeout(store: str) -> str:
    world = World.from_env()
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world.world_size),
        rank=world.rank,
        world_size=world.world_size,
        timeout=timedelta(seconds=2),
    )
    return world.once_per_node((lambda: time.sleep(5) or f"of {world.rank}") if world.local_rank == 0 else None)


def test_a_node_waits_for_what_its_first_worker_makes_however_long_that_takes(tmp_path: Path) -> None:
    results = run_workers(4, share_what_takes_longer_than_the_timeout, str(tmp_path / "store"), local_world_size=2)
    assert results == ["of 0", "of 0", "of 2", "of 2"]
