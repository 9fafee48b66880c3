"""DecentDP in real gloo processes against the dense simulation in one process, and what its users rely on."""

import functools
import gc
import math
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from decent import DecentDP, PeerError, World, build_topology
from decent.simulate import simulate, stack_parameters
from optim import AccumAdamW
from tests.multirank.workers import WorkerError, run_workers

pytestmark = pytest.mark.dist

N_STEPS, N_MICRO_BATCHES, CLIP, EVALUATE_AT = 14, 2, 0.5, 5
Shape = tuple[int, int]  # n workers, workers per node
WORLDS: list[Shape] = [(1, 1), (2, 2), (2, 1), (3, 3), (4, 4), (4, 2), (6, 2), (6, 1), (8, 2)]
Check = tuple[Callable[..., Any], *tuple[Any, ...]]  # a function that every worker calls, and its arguments


class Net(nn.Module):
    """Small, with tied weights, a parameter without a gradient in step 0, and sizes that leave gaps when aligned."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(11, 7)
        nn.init.normal_(self.table.weight, std=0.2)  # as small as those of GPT-2: 1e-6 is some float32 roundings
        self.hidden = nn.Linear(7, 7)
        self.late = nn.Parameter(torch.ones(7))

    def forward(self, idx: Tensor, step: int = 0) -> Tensor:
        x = torch.tanh(self.hidden(self.table(idx)))
        return (x * self.late if step else x) @ self.table.weight.T


def backward(module: nn.Module, rank: int, step: int) -> None:
    """Add the worker's own gradient of the step, in micro-batches."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    for _ in range(N_MICRO_BATCHES):
        idx = torch.randint(11, (5, 3), generator=generator)
        loss = nn.functional.cross_entropy(module(idx, step).flatten(0, 1), idx.roll(1, 0).flatten())
        (loss / N_MICRO_BATCHES).backward()


def make_optimizer(name: str, module: nn.Module) -> torch.optim.Optimizer:
    if name == "accumadamw":
        return AccumAdamW(module.parameters(), lr=3e-3, accum_steps=3)
    return torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.1)


def parameters_of(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


class Case(NamedTuple):
    topology: str | None
    optimizer: str = "accumadamw"
    comm_dtype: torch.dtype | None = None
    gossip_every: int = 1


def train(case: Case, evaluate_at: int | None, compile_wrapper: bool = False) -> dict[str, Any]:
    world = World.from_env()
    module = Net(seed=world.rank)  # DecentDP has to make them equal
    model: Any = DecentDP(module, case.topology, comm_dtype=case.comm_dtype, gossip_every=case.gossip_every)
    if compile_wrapper:
        model = torch.compile(model, backend="eager")
    optimizer = make_optimizer(case.optimizer, module)
    seen: dict[Any, Any] = {"initial": parameters_of(module)}
    for step in range(N_STEPS):
        if step in (0, evaluate_at) and evaluate_at is not None:
            own = parameters_of(module)
            seen["consensus_distance", step] = model.consensus_distance()
            with model.averaged():
                seen["mean", step] = parameters_of(module)
            assert all(map(torch.equal, own, parameters_of(module)))
        if world.rank == 0:
            model(torch.zeros(1, 1, dtype=torch.long))  # without a backward: it must not shift the topology
        optimizer.zero_grad()  # before the first gradient: it must not get lost
        backward(model, world.rank, step)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        model.mix()
        optimizer.step()
        model.exchange()
    seen["final"] = parameters_of(module)
    return seen


def cases_of(world: Shape) -> list[Case]:
    n, local = world
    last = "alternating-exp-ring" if n // local % 2 == 0 else "ring"
    # With more workers a node's mean has other roundings than the simulation's, and bfloat16 makes them large.
    rounded = [Case(last, comm_dtype=torch.bfloat16, gossip_every=k) for k in (1, 3)] if local <= 2 else []
    plain = [Case(topology) for topology in dict.fromkeys(("complete", "exp", "ring", last))]
    return [*plain, Case("exp", "adamw"), Case(last, gossip_every=3), *rounded]


def run_checks(checks: list[Check]) -> list[Any]:
    return [function(*arguments) for function, *arguments in checks]


@functools.cache
def launch(world: Shape) -> dict[Check, list[Any]]:
    """Results of each rank, by check: one launch of n processes serves all tests of a world."""
    checks = [(train, case, EVALUATE_AT) for case in cases_of(world)] + MORE_CHECKS.get(world, [])
    by_rank = run_workers(world[0], run_checks, checks, local_world_size=world[1])
    return {check: [ranks[i] for ranks in by_rank] for i, check in enumerate(checks)}


@functools.cache
def dense(world: Shape, case: Case, n_steps: int) -> list[nn.Module]:
    assert case.topology is not None
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
def test_processes_reach_the_parameters_of_the_dense_simulation(world: Shape, case: Case) -> None:
    modules = dense(world, case, N_STEPS)
    for rank, seen in enumerate(launch(world)[train, case, EVALUATE_AT]):
        for found, wanted in zip(seen["final"], modules[rank].parameters(), strict=True):
            torch.testing.assert_close(found, wanted.detach(), atol=1e-6, rtol=0)
        assert not any(map(torch.equal, seen["final"], seen["initial"]))


@pytest.mark.parametrize(("world", "case"), ALL)
def test_averaged_holds_the_mean_in_the_same_bits_on_each(world: Shape, case: Case) -> None:
    ranks = launch(world)[train, case, EVALUATE_AT]
    for step in (0, EVALUATE_AT):
        xs = stack_parameters(dense(world, case, step))  # each (n, *shape)
        distance = math.sqrt(sum(((x - x.mean(0)) ** 2).sum().item() for x in xs) / world[0])
        for seen in ranks:
            assert all(map(torch.equal, seen["mean", step], ranks[0]["mean", step]))
            for found, x in zip(seen["mean", step], xs, strict=True):
                torch.testing.assert_close(found.double(), x.mean(0), atol=1e-6, rtol=0)
            assert seen["consensus_distance", step] == pytest.approx(distance, abs=1e-5)


def test_workers_start_with_rank_0s_parameters() -> None:
    for seen in launch((4, 2))[train, Case("exp"), EVALUATE_AT]:
        assert all(map(torch.equal, seen["initial"], parameters_of(Net(seed=0))))


def test_evaluation_does_not_change_a_bit_of_training() -> None:
    case = Case("alternating-exp-ring", "accumadamw", torch.bfloat16)
    evaluated, undisturbed = launch((4, 2))[train, case, EVALUATE_AT], launch((4, 2))[train, case, None]
    for a, b in zip(evaluated, undisturbed, strict=True):
        assert all(map(torch.equal, a["final"], b["final"]))


def test_compiling_the_wrapper_changes_nothing() -> None:
    plain, compiled = (launch((2, 2))[train, Case("exp"), *options] for options in ((EVALUATE_AT,), (None, True)))
    for a, b in zip(plain, compiled, strict=True):
        for x, y in zip(a["final"], b["final"], strict=True):
            torch.testing.assert_close(x, y, atol=1e-6, rtol=0)


def default_topology_name() -> str:
    return DecentDP(Net(0)).topology.name


@pytest.mark.parametrize(("world", "name"), [((4, 2), "alternating-exp-ring"), ((3, 3), "exp")])
def test_topology_defaults_to_one_that_fits_the_nodes(world: Shape, name: str) -> None:
    assert set(launch(world)[default_topology_name,]) == {name}


def exchange_rounded(topology: str) -> tuple[Tensor, Tensor, float]:
    """Weights before and after 200 exchanges, and the last consensus distance as a share of the first."""
    module = nn.Linear(40, 40, bias=False)
    model = DecentDP(module, topology, comm_dtype=torch.bfloat16)
    with torch.no_grad():
        module.weight.copy_(torch.randn(40, 40, generator=torch.Generator().manual_seed(World.from_env().rank)))
    before, distance = module.weight.detach().clone(), model.consensus_distance()
    for _ in range(200):
        model.exchange()
        model.mix()
    return before, module.weight.detach().clone(), model.consensus_distance() / distance


@pytest.mark.parametrize(("topology", "world"), [("exp", (3, 3)), ("ring", (3, 3)), ("alternating-exp-ring", (4, 2))])
def test_rounded_exchanges_keep_the_mean_and_reach_consensus(topology: str, world: Shape) -> None:
    befores, afters, distances = zip(*launch(world)[exchange_rounded, topology], strict=True)
    before, after = (torch.stack(xs).double().mean(0) for xs in (befores, afters))
    # Values of about 1, in float32: one rounding is 6e-8 and they add up to a random walk. One of bfloat16 is 2e-3.
    torch.testing.assert_close(after, before, atol=4e-6, rtol=0)
    assert max(distances) < 0.01


def batch_norm_statistics() -> list[Tensor]:
    rank = World.from_env().rank
    module = nn.BatchNorm1d(2)
    mean: Any = module.running_mean
    mean.fill_(rank)
    model = DecentDP(module, "exp")
    seen = [mean.clone()]
    model(torch.full((4, 2), float(rank)))
    seen.append(mean.clone())
    with model.averaged():
        seen.append(mean.clone())
    return [*seen, mean.clone()]


def test_statistics_are_averaged_for_evaluation_and_restored() -> None:
    for rank, (start, own, averaged, after) in enumerate(launch((2, 2))[batch_norm_statistics,]):
        assert torch.equal(start, torch.zeros(2))
        torch.testing.assert_close(own, torch.full((2,), 0.1 * rank))
        torch.testing.assert_close(averaged, torch.full((2,), 0.05))
        assert torch.equal(after, own)


def mixed_dtypes() -> list[Tensor]:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).to(torch.bfloat16))
    model = DecentDP(module, "complete")
    for p in module.parameters():
        p.data.fill_(World.from_env().rank)
    model.exchange()
    model.mix()
    return parameters_of(module)


def test_parameters_of_two_dtypes_keep_them_and_mix() -> None:
    for found in launch((2, 2))[mixed_dtypes,]:
        assert [p.dtype for p in found] == [torch.float32] * 2 + [torch.bfloat16] * 2
        assert all((p == 0.5).all() for p in found)


def misuse(kind: str) -> str:
    module = Net(0)
    model = DecentDP(module, "exp")
    with pytest.raises((RuntimeError, ValueError)) as caught:  # noqa: PT012
        if kind == "complete":
            DecentDP(module, "complete", comm_dtype=torch.bfloat16)
        elif kind == "never":
            DecentDP(module, "exp", gossip_every=0)
        elif kind == "twice":
            model.exchange()
            model.exchange()
        else:
            with model.averaged():
                model.mix()
    return str(caught.value)


MISUSE = {
    "twice": "called twice",
    "inside": "not inside averaged()",
    "complete": 'topology "complete" cannot send torch.bfloat16',
    "never": "gossip_every = 0 must be at least 1",
}


@pytest.mark.parametrize("kind", MISUSE)
def test_misuse_is_refused_in_words(kind: str) -> None:
    (text,) = launch((1, 1))[misuse, kind]
    assert MISUSE[kind] in text


def replace_parameters(then: str) -> str:
    module = Net(0)
    model = DecentDP(module, "exp")
    model.mix()
    model.exchange()
    module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError) as caught:  # noqa: PT012
        if then == "resume_exchange":
            model.resume_exchange(model.in_flight())
        elif then == "averaged":
            with model.averaged():
                pass
        for _ in range(100):
            model.mix()
            model.exchange()
    return f"step {model.step}: {caught.value}"


@pytest.mark.parametrize(("then", "step"), [("resume_exchange", 1), ("averaged", 1), ("train", 100)])
def test_replaced_parameters_are_refused(then: str, step: int) -> None:
    (text,) = launch((1, 1))[replace_parameters, then]
    assert text.startswith(f"step {step}: parameters were replaced")


def exchange_before_rank_1(topology: str) -> bool:
    """Rank 1 starts its own exchange only when rank 0's call has returned."""
    store = dist.PrefixStore(topology, dist.distributed_c10d._get_default_store())
    model = DecentDP(Net(0), topology)
    for step in range(4):
        model.mix()
        if dist.get_rank() == 1:
            store.wait([f"rank 0 computes step {step}"], timedelta(seconds=20))
        model.exchange()
        if dist.get_rank() == 0:
            store.set(f"rank 0 computes step {step}", "")
    return True


@pytest.mark.parametrize("topology", ["complete", "exp", "alternating-exp-ring"])
def test_an_exchange_does_not_wait_for_the_neighbour(topology: str) -> None:
    assert all(launch((4, 2))[exchange_before_rank_1, topology])


MORE_CHECKS: dict[Shape, list[Check]] = {
    (1, 1): [
        *((misuse, kind) for kind in MISUSE),
        *((replace_parameters, then) for then in ("resume_exchange", "averaged", "train")),
    ],
    (2, 2): [(train, Case("exp"), None, True), (batch_norm_statistics,), (mixed_dtypes,)],
    (3, 3): [(default_topology_name,), (exchange_rounded, "exp"), (exchange_rounded, "ring")],
    (4, 2): [
        (default_topology_name,),
        (train, Case("alternating-exp-ring", "accumadamw", torch.bfloat16), None),
        (exchange_rounded, "alternating-exp-ring"),
        *((exchange_before_rank_1, topology) for topology in ("complete", "exp", "alternating-exp-ring")),
    ],
}


# Memory and lost workers: launches of their own ----------------------------------------------------------------------


def memory_kib(name: str) -> int:
    """VmRSS of this process, or its peak VmHWM."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0])


def copies_in_memory(comm_dtype: torch.dtype | None, gossip_every: int) -> float:
    """Memory beside the parameters at the peak of some exchanges, as a multiple of the parameters."""
    module = nn.Linear(4096, 4096, bias=False)  # 64 MiB
    alone = memory_kib("VmRSS")
    model = DecentDP(module, "exp", comm_dtype=comm_dtype, gossip_every=gossip_every)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what there is
    for _ in range(2 * gossip_every):
        model.mix()
        model.exchange()
    model.wait()
    copies = (memory_kib("VmHWM") - alone) * 1024 / module.weight.nbytes
    del model
    gc.collect()
    return copies


COPIES = {(None, 1): 1, (torch.bfloat16, 1): 1, (torch.bfloat16, 2): 2}


def test_an_exchange_takes_one_copy_of_parameters_and_snapshots_another() -> None:
    for ranks in run_workers(2, run_checks, [(copies_in_memory, *options) for options in COPIES]):
        for found, copies in zip(ranks, COPIES.values(), strict=True):
            assert copies <= found < copies + 0.8  # chunks under way take 0.6, however large the parameters are


def lose_rank_1_in_step_3(how: str) -> str:
    rank = World.from_env().rank
    store = dist.distributed_c10d._get_default_store()
    module = Net(0)
    model = DecentDP(module, "ring", timeout_s=2)
    try:
        for step in range(8):
            if rank == 1 and step == 3:
                if how == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                store.wait(["rank 0 has noticed"], timedelta(seconds=60))
                return "hung"
            model.mix()
            model.exchange()
            if how == "hangs before an evaluation" and step == 3:
                model.consensus_distance()
    except PeerError as error:
        store.set("rank 0 has noticed", "")
        if how == "dies":
            raise  # for the harness to report, which cannot do without a rank
        return str(error)
    return "nothing was noticed"


@pytest.mark.fault
@pytest.mark.parametrize("how", ["hangs", "hangs before an evaluation"])
def test_hanging_worker_is_named_with_the_step(how: str) -> None:
    found, _ = run_workers(2, lose_rank_1_in_step_3, how)
    assert found.startswith("step 4: no answer from rank 1: ")  # what rank 1 sent after step 2 was still there


@pytest.mark.fault
def test_dead_worker_is_named_with_the_step() -> None:
    with pytest.raises(WorkerError, match=r"rank 0: (.|\n)*PeerError: step [34]: no answer from rank 1: "):
        run_workers(2, lose_rank_1_in_step_3, "dies")


# The harness, and what all workers decide together --------------------------------------------------------------------


def fail_on_rank_1() -> None:
    if World.from_env().rank == 1:
        raise KeyError("on purpose")


def test_a_failing_worker_fails_the_test() -> None:
    with pytest.raises(WorkerError, match=r"rank 1: (.|\n)*on purpose"):
        run_workers(2, fail_on_rank_1)


def share_with_a_mistake_of(rank: int) -> str:
    """Message on this rank when rank 0 fails in what it makes for the others, or another rank before it takes part."""
    world = World.from_env()

    def fail() -> str:
        raise ValueError("no such thing")

    with pytest.raises(ValueError) as caught, world.raise_on_all_ranks():  # noqa: PT011, PT012
        if world.rank == rank != 0:
            fail()
        world.once_per_node(fail if world.rank == rank else None)
    return str(caught.value)


def test_one_workers_mistake_ends_all_with_its_message() -> None:
    for messages in run_workers(3, run_checks, [(share_with_a_mistake_of, rank) for rank in (0, 1)]):
        for rank, message in enumerate(messages):
            assert message.startswith(f"rank {rank} on ")
            assert message.endswith(": no such thing")


def share_what_takes_longer_than_the_timeout(path: str) -> str:
    world = World.from_env()
    dist.destroy_process_group()
    store, timeout = dist.FileStore(path, world.world_size), timedelta(seconds=2)
    dist.init_process_group("gloo", timeout=timeout, world_size=world.world_size, rank=world.rank, store=store)
    return world.once_per_node((lambda: time.sleep(2.5) or f"of {world.rank}") if world.local_rank == 0 else None)


def test_a_node_waits_longer_than_the_timeout_for_what_it_shares(tmp_path: Path) -> None:
    results = run_workers(4, share_what_takes_longer_than_the_timeout, str(tmp_path / "store"), local_world_size=2)
    assert results == ["of 0", "of 0", "of 2", "of 2"]
