"""Pre-trains GPT-2 with All-Reduce (pytorchddp) or decentralized (decentdp) data parallel training.

    torchrun --nproc_per_node=4 train.py config/quickstart.toml
    python train.py config/quickstart.toml train.n_steps=100 train.topology=ring

Every worker runs this file from top to bottom; what only one of them does is said with `world.rank == 0`.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import wandb
from loguru import logger
from torch import Tensor, nn
from tqdm import tqdm

from config import Config, load_config
from data import TokenDataset, prefetch
from data.loader import Split
from decent import AllReduceDP, DecentDP, PeerError, SetupError, World, build_topology
from model import GPT
from optim import build_optimizer, lr_at

LOG_FORMAT = "[{time:HH:mm:ss} {level: >5}] {message}"
CHECK_INTERVAL = 10  # steps between two looks at the loss: reading it makes the host wait for the GPU
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12}  # dense bfloat16, from NVIDIA's data sheets (SXM)


class NonFiniteLoss(RuntimeError):
    """The loss is nan or infinite: training on would only spoil the parameters of the other workers."""


def main() -> int:
    """Exit code: 0; 2 for a mistake in the input, 1 when the loss is not finite, each said in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a TOML file, as in config/")
    parser.add_argument("overrides", nargs="*", help="configuration keys to change: train.n_steps=100")
    args = parser.parse_args()

    world = World.from_env()
    logger.remove()
    if world.rank == 0:  # through tqdm, so that lines and the progress bar do not tear each other
        logger.add(lambda line: tqdm.write(line, file=sys.stderr, end=""), format=LOG_FORMAT)
    try:
        cfg = load_config(args.config, args.overrides)
    except ValueError as error:
        cfg = error  # raised when the workers have met, for then all end with it
    with world.connected(cfg.train.timeout_s if isinstance(cfg, Config) else None):
        try:
            cfg, dataset, run_dir = prepare(world, cfg)
            train(world, cfg, dataset, run_dir)
        except SetupError as error:
            logger.error(error)  # rank 0 speaks for all
            world.gather(None)  # nobody leaves before it has: torchrun ends the others with the first
            return 2
        except (NonFiniteLoss, PeerError) as error:
            if world.rank == 0:
                logger.error(error)
            else:
                print(f"rank {world.rank}: {error}", file=sys.stderr)
            return 1
    return 0


def prepare(world: World, cfg: Config | ValueError) -> tuple[Config, TokenDataset, Path]:
    """Everything that a user can have got wrong is found here, on all workers at once and before a file is written."""
    with world.failing_together():
        if isinstance(cfg, ValueError):
            raise cfg
        world.require_a_device()
        cfg.train.micro_batches(world.world_size)
        if cfg.train.backend == "decentdp":
            build_topology(cfg.train.topology, world.world_size, world.local_world_size)
        if cfg.log.wandb_log and world.rank == 0:
            log_in_to_wandb()
        corpora = sorted(folder.parent.name for folder in Path(__file__).parent.glob("data/*/prepare.py"))
        if cfg.dataset not in corpora:
            raise ValueError(f'dataset = "{cfg.dataset}" has no folder under data/; there are {", ".join(corpora)}')
        dataset = TokenDataset(
            cfg.data_dir,
            cfg.train.context_length,
            cfg.train.seed,
            cfg.in_memory,
            vocab_size=cfg.model.vocab_size,
            local_rank=world.local_rank,
            share=world.share_on_node if world.local_world_size > 1 else None,
        )
    with world.failing_together():
        name = cfg.log.run_name or world.job_id or datetime.now().strftime("%Y%m%d-%H%M%S")
        run_dir = Path(cfg.log_dir) / world.gather(name)[0]  # clocks differ: rank 0's
        if world.rank == 0:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "config.toml").write_text(cfg.to_toml())
            logger.add(run_dir / "train.log", format=LOG_FORMAT)
    return cfg, dataset, run_dir


def train(world: World, cfg: Config, dataset: TokenDataset, run_dir: Path) -> None:
    torch.manual_seed(cfg.train.seed)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    gpt = GPT(cfg.model, cfg.train.context_length).to(world.device)
    if cfg.train.compile:
        gpt.compile()  # in place: the keys of the state_dict stay those of GPT-2
    model = wrap(gpt, cfg, world)
    optimizer = build_optimizer(gpt, cfg.train.optim, cfg.train.lr_schedule.lr, compile=cfg.train.compile)
    autocast, scaler = mixed_precision(cfg, world.device)
    torch.manual_seed(cfg.train.seed + 1 + world.rank)  # from here on only dropout draws: not the same on all workers

    report = Report(world, cfg, run_dir, gpt)
    n_micro_batches = cfg.train.micro_batches(world.world_size)
    # Resuming a run belongs here: set first_step, and load what model, optimizer, scaler and report hold.
    first_step = 0
    loss = torch.zeros((), device=world.device)
    with closing(local_batches(world, cfg, dataset, "train", first_step, cfg.train.n_steps)) as batches, report:
        for step, (x, y) in enumerate(batches, first_step):
            lr = lr_at(step, cfg.train.lr_schedule, cfg.train.n_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            loss.zero_()
            for i, (xs, ys) in enumerate(zip(x.chunk(n_micro_batches), y.chunk(n_micro_batches), strict=True), 1):
                with nullcontext() if i == n_micro_batches else model.no_sync():
                    with autocast:
                        micro_loss = model(xs, ys)[1] / n_micro_batches
                    scaler.scale(micro_loss).backward()
                    loss += micro_loss.detach()
            if cfg.train.grad_norm_clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(gpt.parameters(), cfg.train.grad_norm_clip)
            model.mix()  # decentdp: wait for the neighbours, x <- W x
            scaler.step(optimizer)
            model.exchange()  # decentdp: start sending the new x
            scaler.update()

            report.progress(step + 1, loss)
            if (step + 1) % cfg.log.eval_interval == 0 or step + 1 == cfg.train.n_steps:
                with report.pause():
                    consensus_distance = model.consensus_distance()
                    with model.averaged(), autocast:
                        losses = evaluate(model, world, cfg, dataset)
                        report.evaluation(step + 1, losses, lr=lr, consensus_distance=consensus_distance)


def wrap(gpt: GPT, cfg: Config, world: World) -> DecentDP | AllReduceDP:
    """The data parallel model: either way it has the verbs mix, exchange, averaged and no_sync."""
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
    return AllReduceDP(gpt, world.device)


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


def local_batches(
    world: World, cfg: Config, dataset: TokenDataset, split: Split, first: int, last: int, *, evaluation: bool = False
) -> Generator[tuple[Tensor, Tensor]]:
    """This worker's rows of the global batches first, ..., last - 1, each (rows, context_length), on its device."""
    size = cfg.train.global_batch_size // world.world_size
    rows = slice(world.rank * size, (world.rank + 1) * size)
    return prefetch(
        lambda step: dataset.batch(split, step, rows, cfg.train.global_batch_size, evaluation=evaluation),
        first,
        last,
        device=world.device,
    )


@torch.no_grad()
def evaluate(model: nn.Module, world: World, cfg: Config, dataset: TokenDataset) -> dict[str, float]:
    """Mean loss of each split over eval_steps global batches: the same batches in every evaluation."""
    n_micro_batches = cfg.train.micro_batches(world.world_size)
    splits: tuple[Split, Split] = ("val", "train")
    losses = torch.zeros(len(splits), device=world.device)
    model.eval()
    for i, split in enumerate(splits):
        with closing(local_batches(world, cfg, dataset, split, 0, cfg.log.eval_steps, evaluation=True)) as batches:
            for x, y in batches:
                for xs, ys in zip(x.chunk(n_micro_batches), y.chunk(n_micro_batches), strict=True):
                    losses[i] += model(xs, ys)[1]
    model.train()
    mean = world.mean(losses / (cfg.log.eval_steps * n_micro_batches))
    return dict(zip(splits, mean.tolist(), strict=True))


class Report:
    """What a run tells: progress bar, train.log, metrics.jsonl, Weights & Biases, best_model.pth. Rank 0 writes them.

    Its clock counts training only: it stands still inside `pause`.
    """

    def __init__(self, world: World, cfg: Config, run_dir: Path, gpt: GPT) -> None:
        self.world, self.cfg, self.run_dir, self.gpt = world, cfg, run_dir, gpt
        self.best_val_loss = math.inf
        self.train_time_s = 0.0  # up to the last pause
        self.evaluated_step, self.evaluated_time_s = 0, 0.0  # of the last evaluation
        self.wandb = None
        if cfg.log.wandb_log and world.rank == 0:
            self.wandb = wandb.init(
                project=cfg.log.wandb_project, name=run_dir.name, dir=run_dir, config=cfg.model_dump()
            )
        introduce(world, cfg, gpt)
        quiet = world.rank != 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=cfg.train.n_steps, unit="step", dynamic_ncols=True, disable=quiet)
        self.resumed_at_s = time.perf_counter()

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.wandb is not None:
            self.wandb.finish()

    @contextmanager
    def pause(self) -> Generator[None]:
        self.world.synchronize()
        self.train_time_s += time.perf_counter() - self.resumed_at_s
        yield
        self.world.synchronize()
        self.resumed_at_s = time.perf_counter()

    def progress(self, step: int, loss: Tensor) -> None:
        """After each step, with this worker's own loss, a scalar on its device.

        Raises:
            NonFiniteLoss: it is nan or infinite; looked at every CHECK_INTERVAL steps.
        """
        if step % CHECK_INTERVAL == 0:
            require_finite(loss.item(), step)
            self.bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        self.bar.update(step - self.bar.n)

    def evaluation(self, step: int, losses: dict[str, float], **more: float) -> None:
        """After an evaluation, inside `pause` and while the module holds the averaged parameters.

        Raises:
            NonFiniteLoss: a loss is nan or infinite.
        """
        for loss in losses.values():
            require_finite(loss, step)
        interval_s = self.train_time_s - self.evaluated_time_s
        s_per_step = interval_s / (step - self.evaluated_step)
        self.evaluated_step, self.evaluated_time_s = step, self.train_time_s
        if self.world.rank != 0:
            return
        logger.info(
            f"Step {step}, Val loss: {losses['val']:.6f}, Train loss: {losses['train']:.6f}, "
            f"Train time: {interval_s:.3f} s ({s_per_step * 1e3:.3f} ms/step), "
            f"Total train time: {self.train_time_s:.3f} s"
        )
        tokens_per_s = self.cfg.train.global_batch_size * self.cfg.train.context_length / s_per_step
        metrics = {
            "step": step,
            **{f"{split}_loss": loss for split, loss in losses.items()},
            "train_time_s": interval_s,
            "ms_per_step": s_per_step * 1e3,
            "total_train_time_s": self.train_time_s,
            "tokens_per_s": tokens_per_s,
            **more,
        }
        if peak := peak_flops_per_s(self.world):
            metrics["mfu"] = tokens_per_s * self.gpt.flops_per_token() / peak
        with open(self.run_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)
        if losses["val"] < self.best_val_loss:
            self.best_val_loss = losses["val"]
            self.save_best_model(step)

    def save_best_model(self, step: int) -> None:
        path = self.run_dir / "best_model.pth"
        logger.info("New best model found. Saving...")
        best = {
            "model": self.gpt.state_dict(),
            "model_config": self.cfg.model.model_dump(),
            "context_length": self.cfg.train.context_length,
            "step": step,
            "val_loss": self.best_val_loss,
        }
        torch.save(best, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)  # whole or not at all
        logger.info(f"Saved model to {os.path.join(self.cfg.log_dir, self.run_dir.name, path.name)}")


def introduce(world: World, cfg: Config, gpt: GPT) -> None:
    """What is trained, on what, with which batches."""
    batch, length = cfg.train.global_batch_size, cfg.train.context_length
    n_micro_batches = cfg.train.micro_batches(world.world_size)
    how = cfg.train.backend + (f" over {cfg.train.topology}" if cfg.train.backend == "decentdp" else "")
    logger.info(
        f"{how}, {cfg.train.optim.name}; {world.world_size} workers, {world.local_world_size} on each node, "
        f"{world.device.type}, torch {torch.__version__}"
    )
    decayed = sum(p.numel() for p in gpt.parameters() if p.ndim >= 2)
    logger.info(
        f"Parameters: {gpt.num_params():,} without positions, {gpt.num_params(non_embedding=False):,} with them; "
        f"{decayed:,} with weight decay"
    )
    logger.info(
        f"Global batch: {batch} sequences x {length} tokens = {batch * length:,} tokens per step; "
        f"each worker: {n_micro_batches} x {batch // world.world_size // n_micro_batches} sequences"
    )


def peak_flops_per_s(world: World) -> float | None:
    """Of all workers together in bfloat16; None where it is not known."""
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
    return next((world.world_size * flops for gpu, flops in PEAK_FLOPS.items() if gpu in name), None)


def require_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise NonFiniteLoss(
            f"the loss is {loss} at step {step}: training stops. Try a lower train.lr_schedule.lr, more warmup_steps "
            "or amp = false"
        )


def log_in_to_wandb() -> None:
    """Asks for nothing: a batch job has nobody to answer.

    Raises:
        ValueError: there is no login, or it is not accepted.
    """
    try:
        if wandb.login(prompt=False) or wandb.setup().settings.mode != "online":
            return
        reason = "nobody is logged in"
    except wandb.Error as error:
        reason = str(error).splitlines()[0]
    raise ValueError(
        f"log.wandb_log = true, but Weights & Biases cannot be used ({reason}): "
        "run `wandb login`, set WANDB_MODE=offline, or set log.wandb_log = false"
    )


if __name__ == "__main__":
    sys.exit(main())
