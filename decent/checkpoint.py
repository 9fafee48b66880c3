"""Every worker's state on disk, so that a run resumes as if it had never been stopped.

    <folder>/step-000001000/worker-00000.pt ...    parameters, optimizer, random numbers, ... of each worker
                            index.json             size and SHA-256 of each file, and what decides who can use them

A save holds training up for a copy only; a thread writes the copy:

    training   step | copy | step | step | step | step | step | step
    thread                 | write own file | wait for all files | rank 0: write index, rename the folder |

The folder has its name only when it is complete. Not torch.distributed.checkpoint, whose metadata is a pickle, which
can run code when it is read, and has no checksums.
"""

from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from loguru import logger
from torch import Tensor
from torch.optim import Optimizer

from decent import checkpoint_files as files
from decent.allreduce_dp import AllReduceDP
from decent.checkpoint_files import Saved, State
from decent.decent_dp import DecentDP
from decent.liveness import first_line
from decent.world import SetupError, World

if TYPE_CHECKING:
    from config import Config


class Checkpoints:
    """Saves and restores `model`, its exchange in flight, this worker's random numbers, and `parts`.

    `restore` comes before `running`, and `save` inside it; all three are collectives. A part has state_dict and
    load_state_dict; optimizers keep the hyperparameters of this run's configuration.
    """

    def __init__(
        self, folder: Path, world: World, model: DecentDP | AllReduceDP, parts: Mapping[str, Any], cfg: "Config"
    ) -> None:
        self._folder, self._world, self._model, self._parts, self._cfg = folder, world, model, parts, cfg
        self._about = _describe(cfg)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._group: Any = None  # of the thread, inside `running`: its collectives must not mix with the training's
        self._writing: Future[bool] | None = None  # the last save

    @contextmanager
    def running(self) -> Generator[None]:
        """Block in which `save` works. At its end it waits for the last save."""
        if self._world.rank == 0:
            files.remove_unfinished(self._folder)
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._cfg.train.timeout_s))
        with self._executor:
            yield

    def save(self, step: int) -> None:
        """Copy the state after `step` optimizer steps, which a thread writes. Waits for the previous save."""
        self.wait()
        state: State = {"random": {"cpu": torch.get_rng_state()}}
        if self._world.device.type == "cuda":
            state["random"]["cuda"] = torch.cuda.get_rng_state(self._world.device)
        if not (self._model.replicated and self._world.rank > 0):
            state["model"] = self._model.module.state_dict()
            state["in_flight"] = self._model.in_flight()
            state["parts"] = {name: part.state_dict() for name, part in self._parts.items()}
        copy = files.map_tensors(_to_cpu_memory, state)
        self._world.synchronize()
        self._writing = self._executor.submit(self._write, step, copy)

    def wait(self) -> bool:
        """Wait for the last save. Returns False if it failed (known on rank 0; other ranks may return True)."""
        return self._writing is None or self._writing.result()

    def _write(self, step: int, state: State) -> bool:
        """Write a checkpoint, in the thread. A failure is logged, leaves nothing behind and does not end the run."""
        hidden = self._folder / f".step-{step:09d}"
        answers: list[Any] = [None] * self._world.world_size
        mine = _attempt(files.write_worker, hidden, self._world.rank, state)
        dist.all_gather_object(answers, mine, group=self._group)
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(answers) if error]
        if not errors and self._world.rank == 0:
            _, error = _attempt(self._publish, hidden, step, [worker for worker, _ in answers])
            errors = [error] if error else []
        if errors:
            logger.error(f"checkpoint of step {step} not saved, training goes on: {errors[0]}")
            if self._world.rank == 0:
                files.remove_unfinished(self._folder)
        return not errors

    def _publish(self, hidden: Path, step: int, workers: list[Any]) -> None:
        path = files.publish(hidden, step, self._about, workers)
        logger.info(f"Saved checkpoint {path.name}")
        # Checkpoints of later steps are damaged, or the run would have started from them: they do not count.
        saved = [other for other in files.list_checkpoints(self._folder) if other.name <= path.name]
        for old in saved[: -self._cfg.log.keep_checkpoints]:
            _, error = _attempt(files.remove, old)
            if error:
                logger.warning(f"{old} cannot be removed: {error}")

    def restore(self) -> int:
        """Load the newest undamaged checkpoint and return its number of optimizer steps; 0 means there is none.

        Raises:
            SetupError: all checkpoints are damaged, or find_start raised on one rank or more.
        """
        with self._world.raise_on_all_ranks():
            # Rank 0's answer: other nodes may see an older state of a shared file system.
            candidates = self._world.all_gather(find_start(self._folder, self._cfg))[0]
        if not candidates:
            return 0
        saved, state = self._read_newest(candidates)
        if saved.about["backend"] != self._about["backend"]:
            self._restore_weights(saved, state)
            return 0
        if len(saved.workers) == self._world.world_size:
            self._restore_exactly(saved, state)
        else:
            self._restore_mean(saved, state)
        n_steps = self._cfg.train.n_steps
        done = f", and train.n_steps = {n_steps}: there is nothing left to do" if saved.step >= n_steps else ""
        logger.info(f"Resumed from {saved.path}: step {saved.step}{done}")
        return saved.step

    def _restore_exactly(self, saved: Saved, state: State) -> None:
        """Load this worker's own state: the run resumes bit by bit."""
        self._load(saved, state)
        torch.set_rng_state(state["random"]["cpu"])
        if self._world.device.type == "cuda" and "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"], self._world.device)
        self._model.resume_exchange(state["in_flight"])

    def _restore_mean(self, saved: Saved, state: State) -> None:
        """Load the mean state of another number of workers; each draws random numbers of its own."""
        logger.info(
            f"{saved.path} is of {len(saved.workers)} workers, this run has {self._world.world_size}: "
            "all start from the mean of their parameters and of their optimizers' states"
        )
        self._load(saved, state)
        self._model.resume_exchange({**state["in_flight"], "gossip_every": None})  # the mean has the exchange in it

    def _restore_weights(self, saved: Saved, state: State) -> None:
        """Load the mean parameters of another backend's run."""
        logger.info(
            f"{saved.path} is of backend {saved.about['backend']} with {len(saved.workers)} workers: "
            "took the mean of their parameters, and nothing else; training starts at step 0"
        )
        self._model.module.load_state_dict(state["model"])

    def _load(self, saved: Saved, state: State) -> None:
        self._model.module.load_state_dict(state["model"])
        for name, part in self._parts.items():
            loaded = state["parts"][name]
            if not isinstance(part, Optimizer):
                if loaded:  # a gradient scaler that was off has saved nothing
                    part.load_state_dict(loaded)
            elif saved.about["optimizer"] == self._about["optimizer"]:
                part.load_state_dict({**loaded, "param_groups": part.state_dict()["param_groups"]})
            else:
                logger.info(f"{saved.path} is of {saved.about['optimizer']}: {self._about['optimizer']} starts anew")

    def _read_newest(self, candidates: list[Path]) -> tuple[Saved, State]:
        """Read the same checkpoint on all workers, though each reads other files."""
        for path in reversed(candidates):
            answer, error = _attempt(self._read, path)
            errors = [error for error in self._world.all_gather(error) if error]
            if answer and not errors:
                return answer
            logger.warning(f"{errors[0]}: this checkpoint is not used")
        raise SetupError(
            f"{candidates[-1].parent}: none of {len(candidates)} checkpoints is undamaged; "
            "remove them to start from the beginning"
        )

    def _read(self, path: Path) -> tuple[Saved, State]:
        saved = files.read_index(path)
        if saved.about["backend"] != self._about["backend"] or len(saved.workers) != self._world.world_size:
            return saved, files.read_mean(saved)
        state = files.read_worker(saved, self._world.rank)
        if "model" not in state:  # rank 0 of pytorchddp saves what all workers share
            state = {**files.read_worker(saved, 0), **state}
        return saved, state


def find_start(folder: Path, cfg: "Config") -> list[Path]:
    """Checkpoints from which a run can start, oldest first: its own in `folder`, else those at cfg.checkpoint.

    Raises:
        ValueError: there is none at cfg.checkpoint, or one does not fit this run.
    """
    paths = files.list_checkpoints(folder)
    if not paths and cfg.checkpoint and not (paths := files.list_checkpoints(Path(cfg.checkpoint))):
        raise ValueError(
            f'checkpoint = "{cfg.checkpoint}": there is no checkpoint, as log/RUN/checkpoint/step-000001000'
        )
    for path in paths:
        with suppress(files.DamagedCheckpoint):  # `restore` warns and takes an older one
            _require_fit(files.read_index(path), cfg, folder)
    return paths


def _describe(cfg: "Config") -> dict[str, Any]:
    """Return what decides which states of a checkpoint a run can use."""
    model = {**cfg.model.model_dump(exclude={"dropout"}), "context_length": cfg.train.context_length}
    return {"backend": cfg.train.backend, "optimizer": cfg.train.optim.name, "model": model}


def _require_fit(saved: Saved, cfg: "Config", folder: Path) -> None:
    """Refuse, with a ValueError, another model and, in the run's own `folder`, another backend."""
    now, then = _describe(cfg), saved.about
    for key, value in now["model"].items():
        if value != then["model"].get(key):
            raise ValueError(
                f"{saved.path} is of a model with {key} = {then['model'].get(key)}, this one has {key} = {value}; "
                "set the same, or choose another log.run_name to start anew"
            )
    if saved.path.parent == folder and then["backend"] != now["backend"]:  # its step 0 would come after later steps
        raise ValueError(
            f"{saved.path} is of backend {then['backend']}, this run has {now['backend']}: choose "
            f'another log.run_name; with checkpoint = "{saved.path}" it starts from those weights'
        )


def _attempt(function: Callable[..., Any], *args: Any) -> tuple[Any, str | None]:
    """Return (the function's result, None), or (None, the first line of its error)."""
    try:
        return function(*args), None
    except (OSError, RuntimeError, ValueError) as error:
        return None, first_line(error)


def _to_cpu_memory(t: Tensor) -> Tensor:
    pinned = torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=t.is_cuda)  # kept by torch for the next save
    return pinned.copy_(t, non_blocking=True)
