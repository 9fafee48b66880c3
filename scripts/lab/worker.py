"""One worker of `netlab.py compare`, started by torchrun: measures the step times of interleaved arms.

    torchrun ... -m scripts.lab.worker settings.json result.json

Computation is emulated (emulated_gpt.py). All else is real: communication, optimizers, copies.
"""

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from loguru import logger
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from decent import AllReduceDP, DecentDP, World
from optim import AccumAdamW
from scripts.lab.emulated_gpt import EmulatedGPT
from scripts.lab.methods import Method

LR = 1e-4
SENT_BYTES = Path("/sys/class/net/eth0/statistics/tx_bytes")  # counter of this worker's node
MIN_WARMUP_STEPS = 2


@dataclass(frozen=True)
class Training:
    """A method that is set up in this worker: the calls that make one training step."""

    gpt: EmulatedGPT
    model: nn.Module  # gpt or a wrapper of it
    new_optimizer: Callable[[], Optimizer] | None  # None means that the wrapper has its own
    cycle: int = 1  # steps until the communication repeats
    mix: Callable[[], None] = lambda: None
    exchange: Callable[[], None] = lambda: None
    exchange_alone: Callable[[], object] | None = None  # exchanges of a whole cycle
    drain: Callable[[], None] = lambda: None  # waits for the exchange in flight


def build(method: Method, settings: dict[str, Any], gradients: list[list[Tensor]], world: World) -> Training:
    """Set the method up. Raises ValueError, on all workers, if it cannot run here."""
    torch.manual_seed(0)
    gpt = EmulatedGPT(settings, gradients)
    if method.family == "none":
        return Training(gpt, gpt, _optimizer(method, gpt))
    builders = {"pytorchddp": _pytorchddp, "localsgd": _localsgd, "decentdp": _decentdp, "decent-dp": _decent_dp}
    return builders[method.family](method, gpt, world)


def _optimizer(method: Method, gpt: nn.Module) -> Callable[[], Optimizer]:
    if method.optimizer == "accumadamw":
        return lambda: AccumAdamW(gpt.parameters(), lr=LR)
    return lambda: AdamW(gpt.parameters(), lr=LR, fused=True)


def _pytorchddp(method: Method, gpt: EmulatedGPT, world: World) -> Training:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    if method.variant == "4mb":
        model: DistributedDataParallel = DistributedDataParallel(gpt, gradient_as_bucket_view=True, bucket_cap_mb=4)
    else:
        model = AllReduceDP(gpt, world.device)
    dtype = torch.float32
    if method.variant == "16bit":
        dtype = torch.float16  # torch refuses its bfloat16 hook on CPUs
        model.register_comm_hook(dist.group.WORLD, fp16_compress_hook)
    return Training(gpt, model, _optimizer(method, gpt), exchange_alone=_all_reduce(gpt, dtype))


def _localsgd(method: Method, gpt: EmulatedGPT, _: World) -> Training:
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    def new_optimizer() -> Optimizer:
        averager = PeriodicModelAverager(period=method.every, warmup_steps=0)
        return PostLocalSGDOptimizer(_optimizer(method, gpt)(), averager)

    return Training(gpt, gpt, new_optimizer, cycle=method.every, exchange_alone=_all_reduce(gpt))


def _all_reduce(gpt: EmulatedGPT, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    values = torch.zeros(sum(p.numel() for p in gpt.parameters()), dtype=dtype)
    return lambda: dist.all_reduce(values)


def _decentdp(method: Method, gpt: EmulatedGPT, world: World) -> Training:
    assert method.topology is not None
    comm_dtype = torch.bfloat16 if method.bf16 else None
    model = DecentDP(gpt, method.topology, world.local_world_size, comm_dtype=comm_dtype, gossip_every=method.every)
    cycle = model.topology.period * method.every

    def exchange_alone() -> None:
        for _ in range(cycle):
            model.mix()
            model.exchange()
        model.wait()

    return Training(gpt, model, _optimizer(method, gpt), cycle, model.mix, model.exchange, exchange_alone, model.wait)


def _decent_dp(method: Method, gpt: EmulatedGPT, world: World) -> Training:
    assert method.topology is not None
    try:
        from decent_dp.ddp import DecentralizedDataParallel  # pyright: ignore[reportMissingImports]
        from decent_dp.optim import optim_fn_accum_adamw  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("decent-dp is not installed: pip install decent-dp==0.2.3 --no-deps") from None
    logger.disable("decent_dp")
    if method.topology == "alternating-exp-ring" and world.local_world_size == 1:
        raise ValueError("decent-dp divides by zero in it with one worker on a node")
    model = DecentralizedDataParallel(
        gpt,
        partial(optim_fn_accum_adamw, lr=LR)
        if method.optimizer == "accumadamw"
        else lambda named: AdamW([p for _, p in named], lr=LR, fused=True),
        topology={"exp": "one-peer-exp"}.get(method.topology, method.topology),
        _local_world_size=world.local_world_size,
    )
    cycle, alone = len(model._topo._edges), torch.zeros(sum(p.numel() for p in gpt.parameters()))

    def exchange_alone() -> None:
        for step in range(cycle):
            dist.all_reduce(alone, group=model._topo.get_edge(step).group)

    def drain() -> None:
        for work in filter(None, model._comm_ops):
            work.wait()

    return Training(gpt, model, None, cycle, exchange_alone=exchange_alone, drain=drain)


def run_steps(training: Training, optimizer: Optimizer | None, slowness: list[float]) -> None:
    """Take one training step for each factor of this worker's computation."""
    x = torch.zeros((), requires_grad=True)
    for training.gpt.slowness in slowness:
        training.model(x).backward()
        training.mix()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        training.exchange()


def measure_block(training: Training, settings: dict[str, Any], world: World, round_: int) -> dict[str, Any]:
    """Return the raw numbers of one block: lists over workers, `sent_bytes` over nodes. A collective."""
    optimizer = training.new_optimizer() if training.new_optimizer else None  # its state lives for this block only
    cycle = training.cycle
    n_warmup, n_steps = (-(-n // cycle) * cycle for n in (MIN_WARMUP_STEPS, settings["steps"]))  # whole cycles
    draws = (world.rank, world.world_size, round_, settings["straggler"])
    slowness = [slowness_of(*draws, step) for step in range(n_steps)]
    dist.barrier()
    sent = int(SENT_BYTES.read_text())
    run_steps(training, optimizer, [1.0] * n_warmup)
    dist.barrier()
    start = time.perf_counter()
    run_steps(training, optimizer, slowness)
    ms = 1e3 * (time.perf_counter() - start) / n_steps
    training.drain()
    dist.barrier()
    # Averaged over all steps, the warm-up too: the link still carries the last exchange when the clock stops.
    sent = (int(SENT_BYTES.read_text()) - sent) / (n_warmup + n_steps)

    exchange_ms = None
    if training.exchange_alone:
        dist.barrier()
        start = time.perf_counter()
        training.exchange_alone()
        exchange_ms = 1e3 * (time.perf_counter() - start) / cycle
    workers = world.all_gather({"ms": ms, "exchange_ms": exchange_ms, "sent_bytes": sent})
    block: dict[str, Any] = {key: [worker[key] for worker in workers] for key in workers[0]}
    block["sent_bytes"] = block["sent_bytes"][:: world.local_world_size]  # a node's workers read the same counter
    return {"steps": n_steps, **block}


def slowness_of(rank: int, world_size: int, round_: int, straggler: float, step: int) -> float:
    """Return `straggler` for the worker that is drawn in this step, the same in all arms; 1 for the others.

    Two rounds each have the same draws, in the second a step earlier. Else the parity of a step, by which topologies
    choose pairs and libraries count, would decide which arm meets the harder draws.
    """
    drawn = random.Random(1000 * (round_ // 2) + step + round_ % 2).randrange(world_size)
    return straggler if drawn == rank else 1.0


def main() -> None:
    settings, world = json.loads(Path(sys.argv[1]).read_text()), World.from_env()
    if world.rank != 0:
        logger.remove()  # one worker logs for all
    with world.connected():
        result = measure(settings, world)
        if world.rank == 0:
            Path(sys.argv[2]).write_text(json.dumps(result))
        dist.barrier()


def measure(settings: dict[str, Any], world: World) -> dict[str, Any]:
    gradients = [[torch.randn_like(p) * 1e-3 for p in layer] for layer in EmulatedGPT(settings).layers]
    trainings: dict[str, Training] = {}
    skipped = []
    for method in (Method(**fields) for fields in settings["arms"]):
        try:
            trainings[method.name] = build(method, settings, gradients, world)
        except ValueError as error:
            skipped.append({"name": method.name, "skipped": str(error)})
    blocks: dict[str, list[dict[str, Any]]] = {name: [] for name in trainings}
    for round_ in range(settings["rounds"]):
        for name, training in trainings.items():
            blocks[name].append(measure_block(training, settings, world, round_))
            if world.rank == 0:
                ms = statistics.mean(blocks[name][-1]["ms"])
                print(f"round {round_ + 1}/{settings['rounds']}  {name}: {ms:.0f} ms/step", flush=True)
    arms = [{"name": name, "blocks": blocks} for name, blocks in blocks.items()]
    return {"parameters": sum(g.numel() for layer in gradients for g in layer), "arms": arms, "skipped": skipped}


if __name__ == "__main__":
    main()
