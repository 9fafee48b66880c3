"""The places a run writes to, settled before it trains: terminal, directory, account at Weights & Biases."""

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from loguru import logger
from tqdm import tqdm

from decent.checkpoint_files import whole_file
from decent.liveness import first_line
from decent.world import SetupError, World

if TYPE_CHECKING:
    from config import Config

LOG_FORMAT = "[{time:HH:mm:ss} {level: >5}] {message}"


def log_to_terminal(world: World) -> None:
    """Print the messages of rank 0 on stderr. Other ranks print none."""
    logger.remove()
    if world.rank == 0:  # through tqdm, so that lines and the progress bar do not tear each other
        logger.add(lambda line: tqdm.write(line, file=sys.stderr, end=""), format=LOG_FORMAT)


def log_last_error(world: World, error: Exception) -> None:
    """Log the error that ends this rank. Ranks above 0 print it, unless all ranks have the same error."""
    if world.rank == 0:
        logger.error(error)
    elif not isinstance(error, SetupError):
        print(f"rank {world.rank}: {error}", file=sys.stderr)


def choose_run_dir(world: World, cfg: "Config") -> Path:
    """Return the run directory, named by log.run_name, else the SLURM job id, else the time. A collective.

    A run that torchrun has restarted takes the newest directory with the same config.toml.
    """
    restarted = max(world.all_gather(world.restart_count)) > 0  # a torchrun counts the failures of its own node only
    name = cfg.log.run_name or world.job_id
    if not name and restarted:
        configuration = cfg.to_toml().encode()
        same = [path for path in Path(cfg.log_dir).glob("*/config.toml") if path.read_bytes() == configuration]
        name = max(same, key=lambda path: path.stat().st_mtime).parent.name if same else None
    name = name or datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path(cfg.log_dir) / world.all_gather(name)[0]  # clocks differ: rank 0's


def open_run_dir(run_dir: Path, cfg: "Config") -> None:
    """Make the run directory with its config.toml, and start or continue its train.log.

    Raises:
        ValueError: the directory cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with whole_file(run_dir / "config.toml") as file:
            file.write(cfg.to_toml().encode())
        logger.add(run_dir / "train.log", format=LOG_FORMAT)
    except OSError as error:
        raise ValueError(f'log_dir = "{cfg.log_dir}": {run_dir} cannot be written: {error.strerror}') from None


def log_in_to_wandb() -> None:
    """Check the login to Weights & Biases without asking: a batch job has nobody to answer.

    Raises:
        ValueError: there is no login, or it is not accepted.
    """
    import wandb  # here: it takes a second

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
