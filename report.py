"""What a run tells: progress bar, train.log, metrics.jsonl, Weights & Biases, best_model.pth."""

import errno
import json
import math
import os
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import wandb
from loguru import logger
from torch import Tensor
from tqdm import tqdm

from config import Config
from decent import World
from decent.checkpoint_files import whole_file
from decent.liveness import first_line
from model import GPT

LOG_FORMAT = "[{time:HH:mm:ss} {level: >5}] {message}"
T = TypeVar("T")
CHECK_INTERVAL = 10  # steps between two looks at the loss: reading it makes the host wait for the GPU
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12}  # dense bfloat16, from NVIDIA's data sheets (SXM)


class NonFiniteLoss(RuntimeError):
    """The loss is nan or infinite: training on would only spoil the parameters of the other workers."""


def log_to_terminal(world: World) -> None:
    """From now on rank 0's messages appear on stderr, those of the others nowhere."""
    logger.remove()
    if world.rank == 0:  # through tqdm, so that lines and the progress bar do not tear each other
        logger.add(lambda line: tqdm.write(line, file=sys.stderr, end=""), format=LOG_FORMAT)


def open_run_dir(run_dir: Path, cfg: Config) -> None:
    """Makes it, with its config.toml, and begins, or goes on with, its train.log.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with whole_file(run_dir / "config.toml") as file:
            file.write(cfg.to_toml().encode())
        logger.add(run_dir / "train.log", format=LOG_FORMAT)
    except OSError as error:
        raise ValueError(f'log_dir = "{cfg.log_dir}": {run_dir} cannot be written: {error.strerror}') from None


class Report:
    """Watches the loss on every worker, and tells on rank 0.

    Its clock counts training only: it stands still inside `pause`.
    """

    def __init__(self, world: World, cfg: Config, run_dir: Path, gpt: GPT) -> None:
        self.world, self.cfg, self.run_dir, self.gpt = world, cfg, run_dir, gpt
        self.best_val_loss = math.inf
        self.train_time_s = 0.0  # up to the last pause
        self.data_wait_s = 0.0  # since the last evaluation, for batches
        self.evaluated_step, self.evaluated_time_s = 0, 0.0  # of the last evaluation
        self.wandb_id: str | None = None
        self.wandb = None
        log_setup(world, cfg, gpt)

    def state_dict(self) -> dict[str, Any]:
        names = ("best_val_loss", "train_time_s", "evaluated_step", "evaluated_time_s", "data_wait_s", "wandb_id")
        return {name: getattr(self, name) for name in names} | {"run_name": self.run_dir.name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of the same run; or of one from whose checkpoint this one starts, with a best model of its own."""
        state = dict(state_dict)
        if state.pop("run_name") != self.run_dir.name:
            state |= {"best_val_loss": math.inf, "wandb_id": None}
        for name, value in state.items():
            setattr(self, name, value)

    @contextmanager
    def running(self, first_step: int) -> Generator[None]:
        """While the training loop runs. What was told of steps from first_step on, by a run that was killed, goes."""
        quiet = self.world.rank != 0 or not sys.stderr.isatty()
        n_steps = self.cfg.train.n_steps
        self.bar = tqdm(total=n_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=quiet)
        if self.world.rank == 0:
            with log_write_errors("metrics.jsonl"):
                drop_metrics_after(self.run_dir / "metrics.jsonl", after_step=first_step)
            if self.cfg.log.wandb_log:
                self.wandb = wandb.init(
                    project=self.cfg.log.wandb_project,
                    name=self.run_dir.name,
                    id=self.wandb_id,
                    resume="allow",
                    dir=self.run_dir,
                    config=self.cfg.model_dump(),
                )
                self.wandb_id = self.wandb.id
        self.resumed_at_s = time.perf_counter()
        try:
            yield
        finally:
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

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches of training; what waiting for them takes is reported."""
        start_s = time.perf_counter()
        for batch in batches:
            self.data_wait_s += time.perf_counter() - start_s
            yield batch
            start_s = time.perf_counter()

    def reads_loss_at(self, step: int) -> bool:
        """Whether `progress` reads the loss of this step, for which it waits for the GPU."""
        return step % CHECK_INTERVAL == 0

    def progress(self, step: int, loss: Tensor) -> None:
        """After each step, with this worker's own loss, a scalar on its device.

        Raises:
            NonFiniteLoss: it is nan or infinite, in a step that is looked at.
        """
        if self.reads_loss_at(step):
            value = loss.item()
            self.require_finite(value, step)
            self.bar.set_postfix(loss=f"{value:.3f}", refresh=False)
        self.bar.update(step - self.bar.n)

    def evaluation(self, step: int, losses: dict[str, float], **more: float) -> None:
        """After an evaluation, inside `pause` and while the module holds the averaged parameters.

        Raises:
            NonFiniteLoss: a loss is nan or infinite.
        """
        for loss in losses.values():
            self.require_finite(loss, step)
        interval_s = self.train_time_s - self.evaluated_time_s
        s_per_step = interval_s / (step - self.evaluated_step)
        data_wait_s, self.data_wait_s = self.data_wait_s / (step - self.evaluated_step), 0.0
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
            "data_wait_ms": data_wait_s * 1e3,
            "total_train_time_s": self.train_time_s,
            "tokens_per_s": tokens_per_s,
            **more,
        }
        if peak := peak_flops_per_s(self.world):
            metrics["mfu"] = tokens_per_s * self.gpt.flops_per_token() / peak
        with log_write_errors("metrics.jsonl"):
            append_line(self.run_dir / "metrics.jsonl", json.dumps(metrics))
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)
        if losses["val"] < self.best_val_loss:
            with log_write_errors("best_model.pth"):
                self.save_best_model(step, losses["val"])
                self.best_val_loss = losses["val"]

    def require_finite(self, loss: float, step: int) -> None:
        """
        Raises:
            NonFiniteLoss: it is not, and train.stop_on_nan is set.
        """
        if self.cfg.train.stop_on_nan and not math.isfinite(loss):
            raise NonFiniteLoss(
                f"the loss is {loss} at step {step}: training stops; checkpoints in {self.run_dir} are from before. "
                "Try a lower train.lr_schedule.lr, more warmup_steps or amp = false"
            )

    def save_best_model(self, step: int, val_loss: float) -> None:
        path = self.run_dir / "best_model.pth"
        logger.info("New best model found. Saving...")
        best = {
            "model": self.gpt.state_dict(),
            "model_config": self.cfg.model.model_dump(),
            "context_length": self.cfg.train.context_length,
            "step": step,
            "val_loss": val_loss,
        }
        with whole_file(path) as file:
            torch.save(best, file)
        logger.info(f"Saved model to {os.path.join(self.cfg.log_dir, self.run_dir.name, path.name)}")


@contextmanager
def log_write_errors(name: str) -> Generator[None]:
    """Logs that a file could not be written: a full disk must not end a run of days."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter from torch.save
        logger.error(f"{name} not written, training goes on: {first_line(error)}")


def log_setup(world: World, cfg: Config, gpt: GPT) -> None:
    """What is trained, on what, with which batches."""
    batch, length = cfg.train.global_batch_size, cfg.train.context_length
    n_micro_batches, rows = (
        cfg.train.n_micro_batches(world.world_size),
        cfg.train.rows_per_micro_batch(world.world_size),
    )
    how = cfg.train.backend + (f" over {cfg.train.topology}" if cfg.train.backend == "decentdp" else "")
    if world.restart_count:
        logger.info(f"Restart number {world.restart_count} of this run")
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
        f"each worker: {n_micro_batches} x {rows} sequences"
    )


def peak_flops_per_s(world: World) -> float | None:
    """Of all workers together in bfloat16; None where it is not known."""
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
    return next((world.world_size * flops for gpu, flops in PEAK_FLOPS.items() if gpu in name), None)


def append_line(path: Path, line: str) -> None:
    """The whole line or nothing of it, also on a full disk."""
    with open(path, "ab", buffering=0) as file:
        size_bytes = file.tell()
        data = (line + "\n").encode()
        if file.write(data) < len(data):
            file.truncate(size_bytes)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def drop_metrics_after(path: Path, *, after_step: int) -> None:
    """Takes the lines of later steps out of a metrics.jsonl, and a last one that was cut short."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in lines if json.loads(line)["step"] <= after_step]
        path.with_suffix(".tmp").write_text("".join(kept))
        path.with_suffix(".tmp").replace(path)


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
        reason = first_line(error)
    raise ValueError(
        f"log.wandb_log = true, but Weights & Biases cannot be used ({reason}): "
        "run `wandb login`, set WANDB_MODE=offline, or set log.wandb_log = false"
    )
