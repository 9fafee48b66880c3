"""Pre-trains GPT-2 with All-Reduce (pytorchddp) or decentralized (decentdp) data parallel training.

    torchrun --nproc_per_node=4 train.py config/quickstart.toml
    python train.py config/quickstart.toml train.n_steps=100 train.topology=ring

Every worker runs this file from top to bottom; what only one of them does is said with `world.rank == 0`.
"""

import argparse
import ctypes
import sys
from contextlib import AbstractContextManager, closing, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from config import Config, load_config
from data.corpus import check_meta, read_meta
from data.loader import TokenDataset, TokenError
from decent import (
    AllReduceDP,
    Checkpoints,
    DecentDP,
    Liveness,
    PeerError,
    SetupError,
    StopRequest,
    World,
    build_topology,
    find_start,
)
from evaluation import evaluate
from model import GPT
from optim import build_optimizer, lr_at
from report import NonFiniteLoss, Report, log_in_to_wandb, log_to_terminal, open_run_dir

# glibc's malloc.h: number of the option, value
MALLOC_OPTIONS = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_TOP_PAD": (-2, 2**28)}


def main() -> int:
    """Exit code: 0; 2 for a mistake in the input; 1 for a loss that is not finite, a lost worker or a state that could
    not be saved at the end. Each in a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a TOML file, as in config/")
    parser.add_argument("overrides", nargs="*", help="configuration keys to change: train.n_steps=100")
    args = parser.parse_args()

    world = World.from_env()
    log_to_terminal(world)
    try:
        world.require_that_restarts_meet()
    except ValueError as error:
        logger.error(error)
        return 2
    try:
        cfg = load_config(args.config, args.overrides)
    except ValueError as error:
        cfg = error  # raised when the workers have met, for then all end with it
    timeout_s = cfg.train.timeout_s if isinstance(cfg, Config) else None
    try:
        with world.connected(timeout_s) as liveness, closing(StopRequest(world, liveness, timeout_s)) as stop:
            try:
                tune_process()
                cfg, dataset, run_dir = prepare(world, cfg)
                saved = train(world, cfg, dataset, run_dir, liveness, stop)
            except SetupError as error:
                logger.error(error)  # rank 0 speaks for all
                world.gather(None)  # nobody leaves before it has: torchrun ends the others with the first
                return 2
    except (TokenError, NonFiniteLoss, PeerError) as error:  # found by this worker alone
        if world.rank == 0:
            logger.error(error)
        else:
            print(f"rank {world.rank}: {error}", file=sys.stderr)
        return 2 if isinstance(error, TokenError) else 1
    return 0 if saved else 1  # not 0: the job would be requeued, again and again


def prepare(world: World, cfg: Config | ValueError) -> tuple[Config, TokenDataset, Path]:
    """Everything that a user can have got wrong is found here, on all workers at once and before a file is written."""
    with world.raise_on_all_ranks():
        if isinstance(cfg, ValueError):
            raise cfg
        world.require_gpus()
        cfg.train.n_micro_batches(world.world_size)
        if cfg.train.backend == "decentdp":
            build_topology(cfg.train.topology, world.world_size, world.local_world_size)
        if cfg.log.wandb_log and world.rank == 0:
            log_in_to_wandb()
        data = Path(__file__).parent / "data"
        marks = ("prepare.py", "meta.json", "train.bin")
        corpora = sorted({path.parent.name for mark in marks for path in data.glob(f"*/{mark}")})
        if cfg.dataset not in corpora:
            raise ValueError(f'dataset = "{cfg.dataset}" has no folder under data/; there are {", ".join(corpora)}')
        if (meta := read_meta(cfg.data_dir)) is not None:
            check_meta(meta, cfg.data_dir, cfg.model.vocab_size)
        dataset = TokenDataset(
            cfg.data_dir,
            cfg.train.context_length,
            cfg.train.seed,
            cfg.in_memory,
            vocab_size=cfg.model.vocab_size,
            local_rank=world.local_rank,
            share=world.once_per_node if world.local_world_size > 1 else None,
        )
    with world.raise_on_all_ranks():
        # A torchrun counts the failures of its own node only.
        restarted = max(world.gather(world.restart_count)) > 0
        run_dir = Path(cfg.log_dir) / world.gather(name_of_run(world, cfg, restarted))[0]  # clocks differ: rank 0's
        find_start(run_dir / "checkpoint", cfg)  # a mistake in it is a mistake in the input too
    with world.raise_on_all_ranks():
        if world.rank == 0:
            open_run_dir(run_dir, cfg)
            logger.info(meta.describe() if meta else f"corpus: {cfg.data_dir}, which has no meta.json")
    return cfg, dataset, run_dir


def train(
    world: World, cfg: Config, dataset: TokenDataset, run_dir: Path, liveness: Liveness, stop: StopRequest
) -> bool:
    """Whether the state at its end, or where it was asked to stop, is saved."""
    torch.manual_seed(cfg.train.seed)
    gpt = GPT(cfg.model, cfg.train.context_length).to(world.device)
    autocast, scaler = mixed_precision(cfg, world.device)
    model = wrap(gpt, cfg, world, autocast)
    optimizer = build_optimizer(gpt, cfg.train.optim, cfg.train.lr_schedule.lr, compile=cfg.train.compile)
    torch.manual_seed(cfg.train.seed + 1 + world.rank)  # from here on only dropout draws: not the same on all workers

    report = Report(world, cfg, run_dir, gpt)
    checkpoints = Checkpoints(
        run_dir / "checkpoint", world, model, {"optimizer": optimizer, "scaler": scaler, "report": report}, cfg
    )
    first_step = liveness.step = checkpoints.restore()
    steps, size = range(first_step, cfg.train.n_steps), cfg.train.global_batch_size
    with (
        closing(dataset.batches("train", steps, world.rows(size), size, device=world.device)) as batches,
        closing(checkpoints),
        report.running(first_step),
        liveness.report_own_error(),
    ):
        for step, (x, y) in zip(steps, report.timed(batches), strict=True):
            lr = lr_at(step, cfg.train.lr_schedule, cfg.train.n_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            loss = forward_and_backward(model, x, y, cfg.train.n_micro_batches(world.world_size), autocast, scaler)
            if cfg.train.grad_norm_clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(gpt.parameters(), cfg.train.grad_norm_clip)
            model.mix()  # decentdp: wait for the neighbours, x <- W x
            scaler.step(optimizer)
            model.exchange()  # decentdp: start sending the new x
            scaler.update()

            evaluating, saving = cfg.evaluates_after(step + 1), cfg.saves_after(step + 1)
            # All-Reduce queues a whole step behind the others' gradients; a scaler reads what it found in them.
            waiting = model.replicated or scaler.is_enabled() or evaluating or saving or report.reads_loss_at(step + 1)
            stopping = stop.agreed(step + 1, before_a_wait=waiting)
            report.progress(step + 1, loss)
            if evaluating:
                with report.pause():
                    consensus_distance = model.consensus_distance()
                    with model.averaged(), autocast:
                        losses = evaluate(model, world, cfg, dataset)
                        report.evaluation(step + 1, losses, lr=lr, consensus_distance=consensus_distance)
            if saving or stopping:
                with report.pause():
                    report.require_finite(loss.item(), step + 1)
                    checkpoints.save(step + 1)
            if stopping and step + 1 < cfg.train.n_steps:
                logger.info(f"Asked to stop: ends after step {step + 1}; the same command goes on from there")
                break
        return checkpoints.wait()


def forward_and_backward(
    model: DecentDP | AllReduceDP,
    x: Tensor,
    y: Tensor,
    n_micro_batches: int,
    autocast: AbstractContextManager[Any],
    scaler: torch.amp.GradScaler,
) -> Tensor:
    """Adds the gradient of the mean loss of x, y, both (rows, T), and returns that loss, a scalar."""
    loss = torch.zeros((), device=x.device)
    for i, (xs, ys) in enumerate(zip(x.chunk(n_micro_batches), y.chunk(n_micro_batches), strict=True), 1):
        with nullcontext() if i == n_micro_batches else model.no_sync():
            with autocast:
                micro_loss = model(xs, ys)[1] / n_micro_batches
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
    return loss


def name_of_run(world: World, cfg: Config, restarted: bool) -> str:
    """Of its directory. A run that torchrun has started again goes on in the newest one with this configuration."""
    if name := cfg.log.run_name or world.job_id:
        return name
    if restarted:
        configuration = cfg.to_toml().encode()
        runs = [path for path in Path(cfg.log_dir).glob("*/config.toml") if path.read_bytes() == configuration]
        if runs:
            return max(runs, key=lambda path: path.stat().st_mtime).parent.name
    return datetime.now().strftime("%Y%m%d-%H%M%S")


def tune_process() -> None:
    """Settings of the libraries below PyTorch that only make it faster."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        # Keep freed memory: mapping the logits anew in every step takes two thirds of a small model's step on a CPU.
        for option, value in MALLOC_OPTIONS.values():
            libc.mallopt(option, value)


def wrap(gpt: GPT, cfg: Config, world: World, autocast: AbstractContextManager[Any]) -> DecentDP | AllReduceDP:
    """The data parallel model: either way it has the verbs mix, exchange, averaged and no_sync."""
    if cfg.train.compile:
        gpt.compile()  # in place: the keys of the state_dict stay those of GPT-2
    if cfg.train.backend == "decentdp":
        comm_dtype = None if cfg.train.comm_dtype == "float32" else getattr(torch, cfg.train.comm_dtype)
        return DecentDP(
            gpt,
            cfg.train.topology,
            world.local_world_size,
            comm_dtype,
            cfg.train.gossip_every,
            cfg.train.timeout_s,
        )
    model = AllReduceDP(gpt, world.device)
    rows = cfg.train.rows_per_micro_batch(world.world_size)
    tokens = torch.zeros(rows, cfg.train.context_length, dtype=torch.int64, device=world.device)
    with autocast:
        model.rebuild_buckets(tokens, tokens)
    return model


def mixed_precision(cfg: Config, device: torch.device) -> tuple[AbstractContextManager[Any], torch.amp.GradScaler]:
    """Autocast for forward passes, and a gradient scaler that does nothing unless they run in float16."""
    dtype = torch.float32
    if cfg.train.amp and device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    elif cfg.train.amp and torch.cpu.get_capabilities().get("avx512_bf16"):
        dtype = torch.bfloat16
    elif cfg.train.amp:
        logger.info("train.amp = true, but this processor has no bfloat16 arithmetic: float32 is used")
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


if __name__ == "__main__":
    sys.exit(main())
