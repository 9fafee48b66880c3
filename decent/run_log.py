"""The outputs of a run: progress bar, train.log, metrics.jsonl, Weights & Biases, best_model.pth."""

import errno
import json
import math
import os
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from loguru import logger
from torch import Tensor, nn
from tqdm import tqdm

from decent.checkpoint_files import whole_file
from decent.liveness import first_line
from decent.world import World

if TYPE_CHECKING:
    from config import Config

T = TypeVar("T")
CHECK_INTERVAL = 10  # steps between two looks at the loss, for each of which the host waits for the GPU
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12}  # dense bfloat16, from NVIDIA's data sheets (SXM)


class NonFiniteLoss(RuntimeError):
    """The loss is nan or infinite: training on would only spoil the parameters of the other workers."""

    exit_code = 1


class RunLog:
    """Watches the loss on every rank; rank 0 writes. Its clock counts training only: it stands still inside `pause`.

    module holds the parameters that are trained; n_params counts them without position embeddings.
    """

    def __init__(
        self, world: World, cfg: "Config", run_dir: Path, module: nn.Module, *, n_params: int, flops_per_token: int
    ) -> None:
        self.world, self.cfg, self.run_dir, self.module = world, cfg, run_dir, module
        self.n_params, self.flops_per_token = n_params, flops_per_token
        self.best_val_loss = math.inf
        self.train_time_s = 0.0  # up to the last pause
        self.resumed_at_s = 0.0  # end of the last pause, by time.perf_counter
        self.data_wait_s = 0.0  # time spent waiting for batches since the last evaluation
        self.evaluated_step, self.evaluated_time_s = 0, 0.0  # step and train_time_s of the last evaluation
        self.wandb_id: str | None = None
        self.wandb: Any = None  # the run there, inside `running`
        self.bar = tqdm(disable=True)  # another one inside `running`

    def state_dict(self) -> dict[str, Any]:
        names = ("best_val_loss", "train_time_s", "evaluated_step", "evaluated_time_s", "data_wait_s", "wandb_id")
        return {name: getattr(self, name) for name in names} | {"run_name": self.run_dir.name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state. If it comes from another run, the best loss and the wandb run start afresh."""
        state = dict(state_dict)
        if state.pop("run_name") != self.run_dir.name:
            state |= {"best_val_loss": math.inf, "wandb_id": None}
        for name, value in state.items():
            setattr(self, name, value)

    def log_setup(self) -> None:
        """Log what is trained, how, and with which batches."""
        train, world = self.cfg.train, self.world
        how = train.backend + (f" over {train.topology}" if train.backend == "decentdp" else "")
        sizes = [(p.ndim, p.numel()) for p in self.module.parameters()]
        tokens = train.global_batch_size * train.context_length
        n_micro_batches, rows = train.n_micro_batches(world.world_size), train.rows_per_micro_batch(world.world_size)
        if world.restart_count:
            logger.info(f"Restart number {world.restart_count} of this run")
        logger.info(
            f"{how}, {train.optim.name}; {world.world_size} workers, {world.local_world_size} on each node, "
            f"{world.device.type}, torch {torch.__version__}"
        )
        logger.info(
            f"Parameters: {self.n_params:,} without positions, {sum(n for _, n in sizes):,} with them; "
            f"{sum(n for ndim, n in sizes if ndim >= 2):,} with weight decay"
        )
        logger.info(
            f"Global batch: {train.global_batch_size} sequences x {train.context_length} tokens = {tokens:,} tokens "
            f"per step; each worker: {n_micro_batches} x {rows} sequences"
        )

    @contextmanager
    def running(self, first_step: int) -> Generator[None]:
        """Log the set-up, drop metrics of later steps, which a killed run left, and show progress inside the block."""
        self.log_setup()
        quiet, n_steps = self.world.rank != 0 or not sys.stderr.isatty(), self.cfg.train.n_steps
        self.bar = tqdm(total=n_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=quiet)
        if self.world.rank == 0:
            with log_write_errors("metrics.jsonl"):
                drop_metrics_after(self.run_dir / "metrics.jsonl", step=first_step)
            if self.cfg.log.wandb_log:
                self.wandb = start_wandb(self.cfg, self.run_dir, self.wandb_id)
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
        """Stop the clock inside the block."""
        self.world.synchronize()
        self.train_time_s += time.perf_counter() - self.resumed_at_s
        yield
        self.world.synchronize()
        self.resumed_at_s = time.perf_counter()

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the training batches, and add up the time spent waiting for them."""
        start_s = time.perf_counter()
        for batch in batches:
            self.data_wait_s += time.perf_counter() - start_s
            yield batch
            start_s = time.perf_counter()

    def reads_loss_at(self, step: int) -> bool:
        """Return whether `progress` reads the loss of this step, for which the host waits for the GPU."""
        return step % CHECK_INTERVAL == 0

    def progress(self, step: int, loss: Tensor) -> None:
        """Show that `step` steps are done, and check this rank's loss, a scalar on its device, in some of them."""
        if self.reads_loss_at(step):
            value = loss.item()
            self.require_finite(value, step)
            self.bar.set_postfix(loss=f"{value:.3f}", refresh=False)
        self.bar.update(step - self.bar.n)

    def evaluation(self, step: int, losses: dict[str, float], **more: float) -> None:
        """Write an evaluation, and the model if it is the best one. Called inside `pause`, with averaged parameters."""
        for loss in losses.values():
            self.require_finite(loss, step)
        n_steps, interval_s = step - self.evaluated_step, self.train_time_s - self.evaluated_time_s
        data_wait_s, self.data_wait_s = self.data_wait_s, 0.0
        self.evaluated_step, self.evaluated_time_s = step, self.train_time_s
        if self.world.rank != 0:
            return
        tokens_per_s = self.cfg.train.global_batch_size * self.cfg.train.context_length * n_steps / interval_s
        metrics = {
            "step": step,
            **{f"{split}_loss": loss for split, loss in losses.items()},
            "train_time_s": interval_s,
            "ms_per_step": interval_s / n_steps * 1e3,
            "data_wait_ms": data_wait_s / n_steps * 1e3,
            "total_train_time_s": self.train_time_s,
            "tokens_per_s": tokens_per_s,
            **more,
        }
        if peak := peak_flops_per_s(self.world):
            metrics["mfu"] = tokens_per_s * self.flops_per_token / peak
        logger.info(
            f"Step {step}, Val loss: {losses['val']:.6f}, Train loss: {losses['train']:.6f}, "
            f"Train time: {interval_s:.3f} s ({metrics['ms_per_step']:.3f} ms/step), "
            f"Total train time: {self.train_time_s:.3f} s"
        )
        with log_write_errors("metrics.jsonl"):
            append_line(self.run_dir / "metrics.jsonl", json.dumps(metrics))
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)
        if losses["val"] < self.best_val_loss:
            with log_write_errors("best_model.pth"):
                self.save_best_model(step, losses["val"])
                self.best_val_loss = losses["val"]

    def require_finite(self, loss: float, step: int) -> None:
        """Raise NonFiniteLoss if the loss is nan or infinite, unless train.stop_on_nan is false."""
        if self.cfg.train.stop_on_nan and not math.isfinite(loss):
            raise NonFiniteLoss(
                f"the loss is {loss} at step {step}: training stops; checkpoints in {self.run_dir} are from before. "
                "Try a lower train.lr_schedule.lr, more warmup_steps or amp = false"
            )

    def save_best_model(self, step: int, val_loss: float) -> None:
        logger.info("New best model found. Saving...")
        best = {"model": self.module.state_dict(), "step": step, "val_loss": val_loss}
        best |= {"model_config": self.cfg.model.model_dump(), "context_length": self.cfg.train.context_length}
        with whole_file(self.run_dir / "best_model.pth") as file:
            torch.save(best, file)
        logger.info(f"Saved model to {os.path.join(self.cfg.log_dir, self.run_dir.name, 'best_model.pth')}")


@contextmanager
def log_write_errors(name: str) -> Generator[None]:
    """Log that a file could not be written: a full disk must not end a run of days."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter from torch.save
        logger.error(f"{name} not written, training goes on: {first_line(error)}")


def peak_flops_per_s(world: World) -> float | None:
    """Peak of all GPUs together in bfloat16; None means that it is not known."""
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
    return next((world.world_size * flops for gpu, flops in PEAK_FLOPS.items() if gpu in name), None)


def append_line(path: Path, line: str) -> None:
    """Append the whole line or nothing, also on a full disk."""
    with open(path, "ab", buffering=0) as file:
        size_bytes = file.tell()
        data = (line + "\n").encode()
        if file.write(data) < len(data):
            file.truncate(size_bytes)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def drop_metrics_after(path: Path, *, step: int) -> None:
    """Remove the lines of later steps from a metrics.jsonl, and a last line that was cut short."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        with whole_file(path) as file:
            file.write("".join(line for line in lines if json.loads(line)["step"] <= step).encode())


def start_wandb(cfg: "Config", run_dir: Path, id: str | None) -> Any:
    """Start or continue the run `id` at Weights & Biases; None means a new one."""
    import wandb  # here: it takes a second

    project, config = cfg.log.wandb_project, cfg.model_dump()
    return wandb.init(project=project, name=run_dir.name, id=id, resume="allow", dir=run_dir, config=config)
