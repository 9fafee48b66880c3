"""Agreement of workers on a request to stop. A GPU is only a name here: nothing of a StopRequest is computed on it."""

import os
import signal

import pytest
import torch
import torch.distributed as dist

from decent import Liveness, PeerError, StopRequest, World
from tests.multirank.workers import run_workers

WAIT_S = 2


def requests_of(rank: int, device: str) -> tuple[StopRequest, Liveness, dist.Store]:
    store = dist.distributed_c10d._get_default_store()
    liveness = Liveness(rank, 2, store)
    return StopRequest(World(rank, 2, rank, 2, torch.device(device)), liveness, timeout_s=WAIT_S), liveness, store


def ask_one_and_count_steps(device: str, asked: int) -> list[bool]:
    rank = dist.get_rank()
    stop, _, _ = requests_of(rank, device)
    answers = []
    for step in range(1, 31):
        if rank == 1 and step == asked:
            os.kill(os.getpid(), signal.SIGUSR1)
        answers.append(stop.agreed(step, host_blocks=step % 10 == 0))
        if answers[-1]:
            break
    return answers


@pytest.mark.parametrize(
    ("device", "asked", "ends"),
    [("cpu", 12, 16), ("cuda", 12, 13), pytest.param("cuda", 20, 20, id="in a step that waits for the GPU")],
)
def test_workers_stop_after_the_same_step(device: str, asked: int, ends: int) -> None:
    first, second = run_workers(2, ask_one_and_count_steps, device, asked)
    assert first == second == [False] * (ends - 1) + [True]


def run_ahead_of_rank_1(device: str, lag: int) -> bool:
    """Rank 1 takes part in its next step only when rank 0 is through with `lag` more."""
    rank = dist.get_rank()
    stop, _, store = requests_of(rank, device)
    stop.agreed(1, host_blocks=False)
    for step in range(2, lag + 2):
        if rank == 1 and step == 2:
            store.wait(["rank 0 is ahead"])
        stop.agreed(step, host_blocks=False)
    if rank == 0:
        store.set("rank 0 is ahead", "")
    return True


@pytest.mark.parametrize(("device", "lag"), [("cpu", 4), ("cuda", 1)])
def test_nobody_waits_for_a_worker_slightly_behind(device: str, lag: int) -> None:
    assert all(run_workers(2, run_ahead_of_rank_1, device, lag))


def wait_for_the_gpu_without_rank_1() -> str:
    rank = dist.get_rank()
    stop, liveness, store = requests_of(rank, "cuda")
    Liveness.TIMEOUT_S = 1
    stop.agreed(1, host_blocks=False)
    if rank == 1:
        store.wait(["rank 0 has noticed"])
        return ""
    with pytest.raises(PeerError) as caught, liveness.blame_missing_ranks():
        stop.agreed(2, host_blocks=True)
    store.set("rank 0 has noticed", "")
    return str(caught.value)


@pytest.mark.fault
def test_hanging_worker_is_named_before_the_host_blocks() -> None:
    said, _ = run_workers(2, wait_for_the_gpu_without_rank_1)
    assert said.startswith("after step 2: timed out waiting for rank 1: ")
