"""Benchmarks of the parts that decide the speed of decentralized training, as ratios to what one would use otherwise.

    python scripts/bench.py optimizer --threads 1     # AccumAdamW against torch's AdamW and decent-dp's AccumAdamW
    python scripts/bench.py wrapper                   # a training step in DecentDP against the bare model, one process
    python scripts/bench.py checkpoint                # how long a save holds training up
    python scripts/bench.py exchange --workers 2      # one exchange against an all-reduce, and how much is hidden
    python scripts/bench.py loader                    # batches against nanoGPT's, waiting for them, memory of a corpus
    python scripts/bench.py prepare                   # the preparation of a corpus against nanoGPT's

The arms alternate in short blocks and a ratio is the median over the rounds of the ratio within a round, so that a
machine that others use too slows both sides alike. Times still differ from machine to machine: compare ratios.
"""

import argparse
import functools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import bench_loader, bench_prepare
from scripts.arguments import MAX_PROCESSES, InputError, file_to_write, whole
from scripts.bench_timing import Arms, Result, alternate, compare, peak_temporary_bytes, print_table, repeat

if TYPE_CHECKING:
    import torch
    from torch import nn


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0; 1 when a measurement failed; 2 for a mistake in the input, after one line."""
    args = parse_args(argv)
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # torch reads it when it is imported, workers too
    try:
        results = args.command(args)
        print_table(results)
        if args.json:
            answer = {"arguments": describe(args), "results": results}
            args.json.write_text(json.dumps(answer, indent=2, default=str) + "\n")
    except (InputError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--rounds", type=whole(1), default=20, help="how often each arm is measured")
    common.add_argument("--threads", type=whole(1, 1000), help="of each process; default: what torch takes")
    common.add_argument("--json", type=file_to_write, metavar="FILE", help="also write the results here")
    commands = parser.add_subparsers(required=True, metavar="optimizer|wrapper|checkpoint|exchange|loader|prepare")

    optimizer = commands.add_parser("optimizer", parents=[common], help="steps of a GPT's parameters, no gradients")
    _add_gpt(optimizer, n_layers=6, n_embd=512, vocab_size=20_000)
    optimizer.add_argument("--accum-steps", type=whole(1), default=8, help="a block is one window of so many steps")
    optimizer.add_argument(
        "--cpu-time", action="store_true", help="with --threads 1 on a shared machine: leave out what others run"
    )
    optimizer.set_defaults(command=bench_optimizer)

    wrapper = commands.add_parser("wrapper", parents=[common], help="a world of one worker")
    _add_gpt(wrapper, n_layers=6, n_embd=320, vocab_size=8_000)
    wrapper.add_argument("--small-tensors", type=whole(1), default=600, help="of the second model")
    wrapper.add_argument("--steps", type=whole(1), default=1, help="in a block")
    wrapper.set_defaults(command=bench_wrapper, rounds=50)  # 3% are less than what single steps differ by

    checkpoint = commands.add_parser("checkpoint", parents=[common], help="a world of one worker")
    _add_gpt(checkpoint, n_layers=6, n_embd=320, vocab_size=8_000)
    checkpoint.set_defaults(command=bench_checkpoint)

    exchange = commands.add_parser("exchange", parents=[common], help="gloo workers on this machine")
    exchange.add_argument("--workers", type=whole(1, MAX_PROCESSES), default=2)
    exchange.add_argument("--numel", type=whole(1), default=10_000_000, help="parameters of the model")
    exchange.set_defaults(command=bench_exchange)

    bench_loader.add_parser(commands, common)
    prepare = commands.add_parser("prepare", parents=[common], help="a corpus, in processes of their own")
    bench_prepare.add_arguments(prepare)
    return parser.parse_args(argv)


def _add_gpt(parser: argparse.ArgumentParser, *, n_layers: int, n_embd: int, vocab_size: int) -> None:
    parser.add_argument("--n-layers", type=whole(1), default=n_layers)
    parser.add_argument("--n-embd", type=whole(4, step=4), default=n_embd, help="a multiple of 4")
    parser.add_argument("--vocab-size", type=whole(1, 2**16), default=vocab_size)
    parser.add_argument("--context-length", type=whole(16), default=128)  # the model of small tensors reads 16


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """What was measured where, for the JSON file."""
    import torch

    given = {name: value for name, value in vars(args).items() if name not in ("command", "json")}
    return {"benchmark": args.command.__name__.removeprefix("bench_"), **given, "torch": torch.__version__}


def bench_optimizer(args: argparse.Namespace) -> list[Result]:
    """ms per step averaged over whole windows, and the most memory that a step allocates and frees again."""
    import torch

    model = build_gpt(args).to("cuda" if torch.cuda.is_available() else "cpu")
    params = list(model.parameters())
    for p in params:
        p.grad = torch.randn_like(p)
    window: Arms = {
        name: functools.partial(repeat, opt.step, args.accum_steps) for name, opt in optimizers(args, params)
    }
    times_s = alternate(window, args.rounds, now_s=time.process_time if args.cpu_time else time.perf_counter)
    params_bytes = sum(p.nbytes for p in params)
    print(f"{sum(p.numel() for p in params):,} parameters in {len(params)} tensors, {torch.get_num_threads()} threads")
    rows = compare(times_s, base="AdamW fused", per=args.accum_steps)
    for row in rows:
        peak_bytes = peak_temporary_bytes(window[str(row["arm"])])
        row["temporary % of parameters"] = round(100 * peak_bytes / params_bytes, 2)
    return rows


def optimizers(args: argparse.Namespace, params: "list[nn.Parameter]") -> "list[tuple[str, torch.optim.Optimizer]]":
    """The arms, with the same hyperparameters; all update the same parameters, each with a state of its own."""
    from torch.optim import AdamW

    from optim import AccumAdamW

    shared: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.98), "weight_decay": 0.1}
    arms: list[tuple[str, torch.optim.Optimizer]] = [
        ("AdamW fused", AdamW(params, **shared, fused=True)),
        ("AdamW foreach", AdamW(params, **shared, foreach=True)),
        ("AccumAdamW compiled", AccumAdamW(params, **shared, accum_steps=args.accum_steps)),
        ("AccumAdamW foreach", AccumAdamW(params, **shared, accum_steps=args.accum_steps, compile=False)),
    ]
    try:
        from decent_dp.optim import AccumAdamW as Theirs  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("decent-dp is not installed: pip install decent-dp==0.2.3 --no-deps")
    else:
        arms.append(("decent-dp AccumAdamW", Theirs(params, **shared, accum_iter=args.accum_steps)))
    return arms


def bench_wrapper(args: argparse.Namespace) -> list[Result]:
    """ms per training step (forward, backward, clipping, AdamW) of each model, bare and in DecentDP."""
    from decent import World

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    world = World.from_env()
    rows = []
    with world.connected():
        for name, build in [("GPT", build_gpt), ("small tensors", build_small_tensors)]:
            arms: Arms = {
                f"{name}, {how}": functools.partial(repeat, step, args.steps)
                for how, step in training_steps(args, build, world.device)
            }
            rows += compare(alternate(arms, args.rounds), base=f"{name}, bare", per=args.steps)
    return rows


def training_steps(
    args: argparse.Namespace, build: "Callable[[argparse.Namespace], nn.Module]", device: "torch.device"
) -> list[tuple[str, Callable[[], None]]]:
    import torch
    from torch.nn.utils import clip_grad_norm_

    from decent import DecentDP

    tokens = torch.randint(args.vocab_size, (2, args.context_length), device=device)

    def training_step(model: "nn.Module", wrapped: DecentDP | None) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            optimizer.zero_grad()
            (wrapped or model)(tokens, tokens)[1].backward()
            clip_grad_norm_(model.parameters(), 1.0)
            if wrapped is not None:
                wrapped.mix()
            optimizer.step()
            if wrapped is not None:
                wrapped.exchange()

        return step

    bare, inside = build(args).to(device), build(args).to(device)
    return [
        ("bare", training_step(bare, None)),
        ("in DecentDP", training_step(inside, DecentDP(inside, "complete", local_world_size=1))),
    ]


def bench_checkpoint(args: argparse.Namespace) -> list[Result]:
    """ms that training stands still for a save, beside a copy of as many bytes and a training step, and of a step
    while the files are written."""
    import torch

    from config import Config
    from decent import Checkpoints, DecentDP, World
    from optim import AccumAdamW

    world = World.from_env()
    with world.connected(), tempfile.TemporaryDirectory() as folder:
        gpt = build_gpt(args).to(world.device)
        model, optimizer = DecentDP(gpt, "complete", local_world_size=1), AccumAdamW(gpt.parameters())
        tokens = torch.randint(args.vocab_size, (8, args.context_length), device=world.device)

        def step() -> None:
            optimizer.zero_grad()
            model(tokens, tokens)[1].backward()
            model.mix()
            optimizer.step()
            model.exchange()

        step()
        checkpoints = Checkpoints(Path(folder), world, model, {"optimizer": optimizer}, Config())
        with checkpoints.running():
            state = [
                *gpt.parameters(),
                *(t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)),
            ]
            steps_saved = iter(range(10**9))
            arms: Arms = {
                "copy of the state": lambda: [t.detach().to("cpu", copy=True) for t in state],
                "save": lambda: checkpoints.save(next(steps_saved)),
                "step while it is written": step,
                "step": step,
            }
            waiting = iter(range(10**9))  # before the first arm and the last the files must be there
            times_s = alternate(
                arms, args.rounds, before=lambda: checkpoints.wait() if next(waiting) % 4 in (0, 3) else None
            )
            print(f"state: {sum(t.nbytes for t in state) / 1e6:.0f} MB")
            return compare(times_s, base="step")


def build_gpt(args: argparse.Namespace) -> "nn.Module":
    from config import ModelConfig
    from model import GPT

    cfg = ModelConfig(n_layers=args.n_layers, n_heads=4, n_embd=args.n_embd, vocab_size=args.vocab_size)
    return GPT(cfg, args.context_length)


def build_small_tensors(args: argparse.Namespace) -> "nn.Module":
    """A model of many 16 x 16 matrices, which takes and returns what a GPT does."""
    import torch
    from torch import nn

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(args.small_tensors))

        def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> tuple[None, torch.Tensor]:
            x = (idx + targets)[..., :16].float()
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return None, x.square().mean()

    return Small()


def bench_exchange(args: argparse.Namespace) -> list[Result]:
    """What rank 0 measures. An exchange is averaged over a period of the topology, whose rounds differ."""
    import torch.multiprocessing

    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "results.json"
        torch.multiprocessing.spawn(_exchange_worker, (args, folder, answer), nprocs=args.workers)
        return json.loads(answer.read_text())


def _exchange_worker(rank: int, args: argparse.Namespace, folder: str, answer: Path) -> None:
    """Every worker makes the same calls in the same order: rounds, arms and periods are the same on all."""
    import torch
    import torch.distributed as dist
    from torch import nn

    from decent import DecentDP

    if not args.threads:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.workers))
    store = dist.FileStore(os.path.join(folder, "store"), args.workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=args.workers)
    flat = torch.zeros(args.numel)
    base = "all_reduce"
    arms: Arms = {base: functools.partial(dist.all_reduce, flat)}
    wrapped = {
        name: DecentDP(nn.Linear(1, args.numel, bias=False), name, local_world_size=1)
        for name in topologies(args.workers)
    }
    for name, dp in wrapped.items():
        arms[name] = functools.partial(repeat, lambda dp=dp: (dp.exchange(), dp.mix()), dp.topology.period)
    times_s = alternate(arms, args.rounds, before=dist.barrier)
    for name, dp in wrapped.items():
        times_s[name] = [t / dp.topology.period for t in times_s[name]]
    rows = compare(times_s, base=base)
    for row in rows[1:]:
        row |= hidden(wrapped[str(row["arm"])], statistics.median(times_s[str(row["arm"])]), args.rounds)
    if rank == 0:
        answer.write_text(json.dumps(rows))
    dist.destroy_process_group()


def topologies(n_workers: int) -> list[str]:
    """Those that fit so many nodes of one worker."""
    from decent import build_topology

    names = []
    for name in ("complete", "ring", "exp", "alternating-exp-ring"):
        try:
            build_topology(name, n_workers, 1)
        except ValueError:
            continue
        names.append(name)
    return names


def hidden(dp: Any, exchange_s: float, rounds: int) -> Result:
    """The share of an exchange that takes no time beside a matmul loop, or a sleep, as long as itself."""
    import torch
    import torch.distributed as dist

    exchange_s = _from_rank_0(exchange_s)
    a = torch.randn(256, 256)
    tick_s = statistics.median(alternate({"matmul": functools.partial(torch.mm, a, a)}, 50)["matmul"])
    n_matmuls = math.ceil(_from_rank_0(exchange_s / tick_s))
    loads: Arms = {
        "matmul": functools.partial(repeat, functools.partial(torch.mm, a, a), n_matmuls),
        "sleep": functools.partial(time.sleep, exchange_s),
    }

    def beside(load: Callable[[], object]) -> None:
        dp.exchange()
        load()
        dp.mix()

    shares: Result = {}
    for name, load in loads.items():
        period = dp.topology.period
        arms: Arms = {
            "alone": functools.partial(repeat, load, period),
            "both": functools.partial(repeat, functools.partial(beside, load), period),
        }
        times_s = alternate(arms, rounds, before=dist.barrier)
        added_s = [(b - a) / period for a, b in zip(times_s["alone"], times_s["both"], strict=True)]
        shares[f"% hidden by {name}"] = round(100 * (1 - statistics.median(added_s) / exchange_s), 1)
    return shares


def _from_rank_0(value: float) -> float:
    """A collective."""
    import torch
    import torch.distributed as dist

    shared = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(shared, src=0)
    return shared.item()


if __name__ == "__main__":
    sys.exit(main())
