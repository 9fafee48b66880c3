"""Every worker's state on disk, so that a run goes on as if it had never been stopped.

    <folder>/step-000001000/worker-00000.pt ...    parameters, optimizer, random numbers, ... of each worker
                            index.json             size and SHA-256 of each, and what run it is

A folder of that name is complete: it is written under another one, and renamed when all workers are done. Not
torch.distributed.checkpoint, whose metadata is a pickle, which can run code when it is read, and has no checksums.
"""

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from loguru import logger
from torch import Tensor
from torch.optim import Optimizer

from decent.allreduce_dp import AllReduceDP
from decent.checkpoint_files import (
    DamagedCheckpoint,
    Saved,
    State,
    checkpoints_at,
    list_checkpoints,
    map_tensors,
    read_index,
    read_mean,
    read_worker,
    remove,
    require_files,
    sync_names,
    write_index,
    write_worker,
)
from decent.decent_dp import DecentDP
from decent.liveness import first_line
from decent.world import World

if TYPE_CHECKING:
    from config import Config

T = TypeVar("T")


class Stateful(Protocol):
    def state_dict(self) -> State: ...
    def load_state_dict(self, state_dict: State) -> Any: ...


class Checkpoints:
    """Saves and restores `model`, its exchange, the random numbers of this worker, and `parts`.

    The newest log.keep_checkpoints stay. `save` and `restore` are collectives, and so is making one.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        model: DecentDP | AllReduceDP,
        parts: Mapping[str, Stateful],
        cfg: "Config",
    ) -> None:
        self._folder, self._world, self._model, self._parts, self._cfg = folder, world, model, parts, cfg
        self._about = describe(cfg)
        # For the thread that writes: its collectives must not get between those of the others.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=cfg.train.timeout_s))
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[bool] | None = None
        if world.rank == 0 and folder.exists():
            for leftover in folder.glob(".*"):
                shutil.rmtree(leftover, ignore_errors=True)

    # --- saving

    def save(self, step: int) -> None:
        """Copies the state after `step` optimizer steps to CPU memory; a thread writes it. Waits for the last one."""
        self.wait()
        state: State = {"random": _random_state(self._world.device)}
        if not (self._model.replicated and self._world.rank > 0):
            state["model"] = self._model.module.state_dict()
            state["in_flight"] = self._model.in_flight()
            state["parts"] = {name: part.state_dict() for name, part in self._parts.items()}
        copy = map_tensors(state, _to_cpu_memory)
        self._world.synchronize()
        self._writing = self._executor.submit(self._write, step, copy)

    def wait(self) -> bool:
        """Until the last checkpoint is written, or has failed: then it is False, on worker 0 at least.

        Raises:
            RuntimeError: another worker did not do its part.
        """
        return self._writing is None or self._writing.result()

    def close(self) -> None:
        self._executor.shutdown()

    def _write(self, step: int, state: State) -> bool:
        """In the thread, on all workers. A failure is logged, leaves nothing behind and does not end the run."""
        hidden, path = self._folder / f".step-{step:09d}", self._folder / f"step-{step:09d}"
        try:
            reports = self._gather(_try(lambda: write_worker(hidden, self._world.rank, state)))
            errors = [f"rank {rank}: {report}" for rank, report in enumerate(reports) if isinstance(report, str)]
            if not errors and self._world.rank == 0:
                answer = _try(lambda: self._publish(hidden, path, step, cast(list[dict[str, Any]], reports)))
                errors += [answer] if isinstance(answer, str) else []
            if errors:
                logger.error(f"checkpoint of step {step} not saved, training goes on: {errors[0]}")
                if self._world.rank == 0:
                    shutil.rmtree(hidden, ignore_errors=True)
            return not errors
        except RuntimeError:  # a worker is gone; who waits for the thread learns of it
            logger.error(f"checkpoint of step {step} not saved")
            raise

    def _gather(self, value: T) -> list[T]:
        values: list[T] = [value] * self._world.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _publish(self, hidden: Path, path: Path, step: int, workers: list[dict[str, Any]]) -> None:
        require_files(hidden, workers)
        write_index(hidden, step, self._about, workers)
        if path.exists():  # damaged, or the run would have gone on from it or a later one
            remove(path)
        hidden.rename(path)
        sync_names(self._folder)  # before older ones go
        logger.info(f"Saved checkpoint {path.name}")
        until_now = [
            other for other in list_checkpoints(self._folder) if other.name <= path.name
        ]  # later ones are damaged
        for old in until_now[: -self._cfg.log.keep_checkpoints]:
            if isinstance(error := _try(lambda old=old: remove(old)), str):
                logger.warning(f"{old} cannot be removed: {error}")

    # --- restoring

    def restore(self) -> int:
        """Loads the newest checkpoint that `find_start` gives and returns the steps done; 0: there is none.

        Another world size starts all workers from the mean of the saved ones, another optimizer without a state,
        another backend with that mean's parameters only, at step 0. Learning rate, weight decay and the like are those
        of this run's configuration.

        Raises:
            SetupError: find_start's errors, or none of the checkpoints is undamaged.
        """
        with self._world.raise_on_all_ranks():
            # Rank 0's: what other nodes see of a shared file system may be older.
            candidates = self._world.all_gather(find_start(self._folder, self._cfg))[0]
            if not candidates:
                return 0
            saved, state = self._newest_undamaged(candidates)
            _require_fit(saved, self._about, self._folder)
        n_workers, n_now = len(saved.workers), self._world.world_size
        same_backend = saved.about["backend"] == self._about["backend"]
        self._model.module.load_state_dict(state["model"])
        if not same_backend:
            logger.info(
                f"{saved.path} is of backend {saved.about['backend']} with {n_workers} workers: "
                "took the mean of their parameters, and nothing else; training starts at step 0"
            )
            return 0
        for name, part in self._parts.items():
            if not isinstance(part, Optimizer):
                if state["parts"][name]:  # nothing was saved of a gradient scaler that was switched off
                    part.load_state_dict(state["parts"][name])
            elif saved.about["optimizer"] == self._about["optimizer"]:
                part.load_state_dict({**state["parts"][name], "param_groups": part.state_dict()["param_groups"]})
            else:
                logger.info(f"{saved.path} is of {saved.about['optimizer']}: {self._about['optimizer']} starts anew")
        if n_workers == n_now:
            _set_random_state(state["random"], self._world.device)
        elif not self._model.replicated:
            logger.info(
                f"{saved.path} is of {n_workers} workers, this run has {n_now}: "
                "all start from the mean of their parameters and of their optimizers' states"
            )
            state["in_flight"]["gossip_every"] = None  # what was in flight is in the mean
        else:
            logger.info(f"{saved.path} is of {n_workers} workers, this run has {n_now}")
        self._model.resume_exchange(state["in_flight"])
        n_steps = self._cfg.train.n_steps
        done = f", and train.n_steps = {n_steps}: there is nothing left to do" if saved.step >= n_steps else ""
        logger.info(f"Resumed from {saved.path}: step {saved.step}{done}")
        return saved.step

    def _newest_undamaged(self, candidates: list[Path]) -> tuple[Saved, State]:
        """The same checkpoint on all workers, though each reads other files."""
        for path in reversed(candidates):
            answer = _try(lambda path=path: self._read(path))
            answers = self._world.all_gather(answer if isinstance(answer, str) else None)
            errors = [error for error in answers if error is not None]
            if not errors:
                return cast(tuple[Saved, State], answer)
            logger.warning(f"{errors[0]}: this checkpoint is not used")
        raise ValueError(
            f"{candidates[-1].parent}: none of {len(candidates)} checkpoints is undamaged; "
            "remove them to start from the beginning"
        )

    def _read(self, path: Path) -> tuple[Saved, State]:
        saved = read_index(path)
        mine = self._world.rank
        if saved.about["backend"] == "pytorchddp":  # worker 0 has all but the random numbers of the others
            state = read_worker(saved, 0)
            if 0 < mine < len(saved.workers):
                state["random"] = read_worker(saved, mine)["random"]
            return saved, state
        same = saved.about["backend"] == self._about["backend"] and len(saved.workers) == self._world.world_size
        return saved, read_worker(saved, mine) if same else read_mean(saved)


def find_start(folder: Path, cfg: "Config") -> list[Path]:
    """The checkpoints from which a run whose own are in `folder` may go on, oldest first: its own, else those of
    cfg.checkpoint, which is a checkpoint, a folder of them, or a run directory. None: it starts from scratch.

    Raises:
        ValueError: there is none at cfg.checkpoint, or the newest does not fit this run.
    """
    paths = list_checkpoints(folder) or (checkpoints_at(Path(cfg.checkpoint)) if cfg.checkpoint else [])
    if paths:
        with suppress(DamagedCheckpoint):  # who reads it will take the one before
            _require_fit(read_index(paths[-1]), describe(cfg), folder)
    return paths


def describe(cfg: "Config") -> dict[str, Any]:
    """What decides which states of a checkpoint a run can use."""
    model = {**cfg.model.model_dump(exclude={"dropout"}), "context_length": cfg.train.context_length}
    return {"backend": cfg.train.backend, "optimizer": cfg.train.optim.name, "model": model}


def _require_fit(saved: Saved, about: dict[str, Any], folder: Path) -> None:
    """
    Raises:
        ValueError: it is of another model or, in the run's own `folder`, of another backend, which would start at
            step 0 among checkpoints of later steps.
    """
    now, then = about["model"], saved.about["model"]
    for key in now:
        if now[key] != then.get(key):
            raise ValueError(
                f"{saved.path} is of a model with {key} = {then.get(key)}, this one has {key} = {now[key]}; "
                "set the same, or choose another log.run_name to start anew"
            )
    if saved.path.parent == folder and saved.about["backend"] != about["backend"]:
        raise ValueError(
            f"{saved.path} is of backend {saved.about['backend']}, this run has {about['backend']}: choose "
            f'another log.run_name; with checkpoint = "{saved.path}" it starts from those weights'
        )


def _to_cpu_memory(t: Tensor) -> Tensor:
    if t.device.type == "cpu":
        return t.clone()
    pinned = torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=True)  # its allocator keeps it for the next
    return pinned.copy_(t, non_blocking=True)


def _try(function: Callable[[], T]) -> T | str:
    """What it returns, or what it says in failing, in one line."""
    try:
        return function()
    except (OSError, RuntimeError, ValueError) as error:
        return first_line(error)


def _random_state(device: torch.device) -> State:
    on_gpu = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **on_gpu}


def _set_random_state(state: State, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
