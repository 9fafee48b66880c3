"""Pre-trains GPT-2 with All-Reduce (pytorchddp) or decentralized (decentdp) data parallel training.

    torchrun --nproc_per_node=4 train.py config/quickstart.toml
    python train.py config/quickstart.toml train.n_steps=100 train.topology=ring

Every worker runs this file from top to bottom; what only one of them does is said with `world.rank == 0`.
"""

import argparse
import sys
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from config import Config, load_config
from data.corpus import check_meta, list_datasets, read_meta
from data.loader import Split, TokenDataset, TokenError, prefetch
from decent import AllReduceDP, DecentDP
from decent.checkpoint import Checkpoints, find_start
from decent.liveness import Liveness, PeerError
from decent.run_dir import choose_run_dir, log_in_to_wandb, log_last_error, log_to_terminal, open_run_dir
from decent.run_log import NonFiniteLoss, RunLog
from decent.stop import StopRequest
from decent.topology import build_topology, default_topology
from decent.world import SetupError, World, keep_freed_memory
from model import GPT
from optim import build_optimizer, lr_at


def main() -> int:
    """Return the exit code: 0; 2 if the input is invalid; 1 if training failed, or its end was not saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a TOML file, as in config/")
    parser.add_argument("overrides", nargs="*", help="configuration keys to change: train.n_steps=100")
    args = parser.parse_args()

    world = World.from_env()
    log_to_terminal(world)
    keep_freed_memory()
    cfg, mistake = read_config(args.config, args.overrides)  # one of them is None
    timeout_s = cfg.train.timeout_s if cfg else None
    try:
        with world.connected(timeout_s) as liveness, closing(StopRequest(world, liveness, timeout_s)) as stop:
            world.agree_on_errors(mistake)
            assert cfg is not None
            cfg, dataset, run_dir = set_up(world, cfg)
            saved = train(world, cfg, dataset, run_dir, liveness, stop)
            return 0 if saved else 1  # not 0: the job would be requeued, again and again
    except (SetupError, TokenError, NonFiniteLoss, PeerError) as error:
        log_last_error(world, error)
        return error.exit_code


def read_config(path: str, overrides: list[str]) -> tuple[Config | None, str | None]:
    """Return the configuration, or else the mistake in it: all ranks must have met before one of them raises it."""
    try:
        return load_config(path, overrides), None
    except ValueError as error:
        return None, str(error)


def set_up(world: World, cfg: Config) -> tuple[Config, TokenDataset, Path]:
    """Return the configuration with all defaults resolved, the corpus, and the run directory, which is made.

    Raises:
        SetupError: something is wrong on one rank or more, found before a file was written.
    """
    if cfg.train.topology is None and cfg.train.backend == "decentdp":
        topology = default_topology(world.world_size, world.local_world_size)
        cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"topology": topology})})
    with world.raise_on_all_ranks():
        check_config(world, cfg)
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
        run_dir = choose_run_dir(world, cfg)
        find_start(run_dir / "checkpoint", cfg)  # its errors are mistakes in the input too
    with world.raise_on_all_ranks():
        if world.rank == 0:
            open_run_dir(run_dir, cfg)
            logger.info(meta.describe() if meta else f"corpus: {cfg.data_dir}, which has no meta.json")
    return cfg, dataset, run_dir


def check_config(world: World, cfg: Config) -> None:
    """Check what depends on the machine.

    Raises:
        ValueError: the configuration does not fit the workers, the data folders or the login to wandb.
    """
    world.require_gpus()
    cfg.train.n_micro_batches(world.world_size)
    if cfg.train.topology is not None and cfg.train.backend == "decentdp":
        build_topology(cfg.train.topology, world.world_size, world.local_world_size)
    if cfg.log.wandb_log and world.rank == 0:
        log_in_to_wandb()
    datasets = list_datasets(Path(__file__).parent / "data")
    if cfg.dataset not in datasets:
        raise ValueError(f'dataset = "{cfg.dataset}" has no folder under data/; there are {", ".join(datasets)}')


def train(
    world: World, cfg: Config, dataset: TokenDataset, run_dir: Path, liveness: Liveness, stop: StopRequest
) -> bool:
    """Train to n_steps, or until asked to stop. Return whether the final state was saved."""
    torch.manual_seed(cfg.train.seed)
    gpt = GPT(cfg.model, cfg.train.context_length).to(world.device)
    autocast, scaler = mixed_precision(cfg, world.device)
    model = data_parallel(gpt, cfg, world, autocast)
    optimizer = build_optimizer(gpt, cfg.train.optim, cfg.train.lr_schedule.lr, compile=cfg.train.compile)
    torch.manual_seed(cfg.train.seed + 1 + world.rank)  # from here on only dropout draws: not the same on all workers

    run = RunLog(world, cfg, run_dir, gpt, n_params=gpt.num_params(), flops_per_token=gpt.flops_per_token())
    checkpoints = Checkpoints(
        run_dir / "checkpoint", world, model, {"optimizer": optimizer, "scaler": scaler, "report": run}, cfg
    )
    steps, size = range(checkpoints.restore(), cfg.train.n_steps), cfg.train.global_batch_size
    host_waits = model.replicated or scaler.is_enabled()  # for DDP's gradients or GradScaler's found_inf, in each step
    with (
        closing(dataset.batches("train", steps, world.rows(size), size, device=world.device)) as batches,
        checkpoints.running(),
        run.running(steps.start),
        liveness.report_own_error(),
    ):
        for step, (x, y) in zip(steps, run.timed(batches), strict=True):
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

            done = step + 1
            evaluating, saving = cfg.evaluates_after(done), cfg.saves_after(done)
            stopping = stop.agreed(done, host_blocks=host_waits or evaluating or saving or run.reads_loss_at(done))
            run.progress(done, loss)
            if evaluating:
                with run.pause():
                    consensus_distance = model.consensus_distance()
                    with model.averaged(), autocast:
                        losses = evaluate(model, world, cfg, dataset)
                        run.evaluation(done, losses, lr=lr, consensus_distance=consensus_distance)
            if saving or stopping:
                with run.pause():
                    run.require_finite(loss.item(), done)
                    checkpoints.save(done)
            if stopping and done < cfg.train.n_steps:
                logger.info(f"Asked to stop: ends after step {done}; the same command goes on from there")
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
    """Add the gradient of the mean loss of x, y, both (rows, T), and return that loss, a scalar."""
    loss = torch.zeros((), device=x.device)
    for i, (xs, ys) in enumerate(zip(x.chunk(n_micro_batches), y.chunk(n_micro_batches), strict=True), 1):
        with nullcontext() if i == n_micro_batches else model.no_sync():
            with autocast:
                micro_loss = model(xs, ys)[1] / n_micro_batches
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
    return loss


@torch.no_grad()
def evaluate(model: nn.Module, world: World, cfg: Config, dataset: TokenDataset) -> dict[str, float]:
    """Return the mean loss of each split, the same on all ranks.

    It is that of eval_steps global batches, the same in every evaluation; with eval_full that of all of val.
    """
    model.eval()
    whole = cfg.log.eval_full
    val = whole_loss(model, world, cfg, dataset) if whole else sampled_loss(model, world, cfg, dataset, "val")
    train = sampled_loss(model, world, cfg, dataset, "train")
    model.train()
    return dict(zip(("val", "train"), world.mean(torch.stack([val, train])).tolist(), strict=True))


def sampled_loss(model: nn.Module, world: World, cfg: Config, dataset: TokenDataset, split: Split) -> Tensor:
    """Mean loss of this rank's rows of eval_steps global batches, a float64 scalar."""
    n_micro_batches = cfg.train.n_micro_batches(world.world_size)
    steps, size = range(cfg.log.eval_steps), cfg.train.global_batch_size
    loss = torch.zeros((), dtype=torch.float64, device=world.device)
    with closing(
        dataset.batches(split, steps, world.rows(size), size, device=world.device, evaluation=True)
    ) as batches:
        for x, y in batches:
            for xs, ys in zip(x.chunk(n_micro_batches), y.chunk(n_micro_batches), strict=True):
                loss += model(xs, ys)[1]
    return loss / (cfg.log.eval_steps * n_micro_batches)


def whole_loss(model: nn.Module, world: World, cfg: Config, dataset: TokenDataset) -> Tensor:
    """This rank's share of the loss over all of val, a float64 scalar: the mean over ranks is the mean over targets.

    The ranks take the windows in order, a micro-batch each and interleaved. Some may have one micro-batch less:
    nothing in here waits for another rank.
    """
    rows, T = cfg.train.rows_per_micro_batch(world.world_size), cfg.train.context_length
    n_targets, n_each = dataset.n_targets("val"), rows * T
    firsts = range(world.rank * n_each, n_targets, world.world_size * n_each)  # first target of each micro-batch
    order = torch.arange(n_each, device=world.device).view(rows, T)  # as targets follow each other
    loss = torch.zeros((), dtype=torch.float64, device=world.device)

    def windows_of(i: int) -> Tensor:
        return dataset.windows_in_order("val", firsts[i] // T, rows)

    with closing(prefetch(windows_of, range(len(firsts)), device=world.device)) as batches:
        for first, (x, y) in zip(firsts, batches, strict=True):
            n = min(n_each, n_targets - first)
            # Cross entropy skips targets of -100. Fewer rows instead would be a new shape, and compiled again.
            loss += model(x, y.masked_fill(order >= n, -100))[1].double() * n
    return loss * world.world_size / n_targets


def data_parallel(gpt: GPT, cfg: Config, world: World, autocast: AbstractContextManager[Any]) -> DecentDP | AllReduceDP:
    """Wrap the model for its backend: either way it has the verbs mix, exchange, averaged and no_sync."""
    if cfg.train.compile:
        gpt.compile()  # in place: the keys of the state_dict stay those of GPT-2
    if cfg.train.backend == "decentdp":
        return DecentDP(
            gpt,
            cfg.train.topology,
            world.local_world_size,
            comm_dtype=None if cfg.train.comm_dtype == "float32" else getattr(torch, cfg.train.comm_dtype),
            gossip_every=cfg.train.gossip_every,
            timeout_s=cfg.train.timeout_s,
        )
    rows = cfg.train.rows_per_micro_batch(world.world_size)
    tokens = torch.zeros(rows, cfg.train.context_length, dtype=torch.int64, device=world.device)
    with autocast:
        return AllReduceDP(gpt, world.device, example=(tokens, tokens))


def mixed_precision(cfg: Config, device: torch.device) -> tuple[AbstractContextManager[Any], torch.amp.GradScaler]:
    """Return autocast for forward passes, and a gradient scaler that does nothing unless they run in float16."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
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
