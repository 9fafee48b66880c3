"""Starts train.py for the tests, in folders of their own beside one small corpus.

Most runs fork from a server that has imported torch and wandb once (0.3 s instead of 3 s each). A run that starts as
`python train.py`, or under torchrun, must give the same.
"""

import json
import os
import re
import select
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
TRAIN_PY = ROOT / "train.py"
VOCAB_SIZE, CONTEXT_LENGTH, BATCH_SIZE, EVAL_STEPS = 300, 16, 8, 2
TIMES = {"train_time_s", "ms_per_step", "data_wait_ms", "total_train_time_s", "tokens_per_s"}

CONFIG = f"""
log_dir = "./log"
dataset = "sotu"
in_memory = false
[log]
wandb_log = false
eval_interval = 5
eval_steps = {EVAL_STEPS}
[train]
topology = "exp"
global_batch_size = {BATCH_SIZE}
context_length = {CONTEXT_LENGTH}
n_steps = 12
compile = false
amp = false
[train.optim]
accum_steps = 2
[train.lr_schedule]
lr = 1e-2
warmup_steps = 2
eta_min = 1e-3
[model]
n_layers = 1
n_heads = 2
n_embd = 16
vocab_size = {VOCAB_SIZE}
"""

SERVER = """
import atexit, json, os, runpy, signal, sys, traceback

code = 0

@atexit.register
def leave():  # called last, since it was registered first
    sys.stderr.flush()
    os._exit(code)  # tearing down all that was imported takes five times as long as a run

import loguru, numpy, pydantic, torch.distributed, torch.nn.parallel, tqdm, wandb
import torch._dynamo  # the first step of any optimizer imports it

for line in sys.stdin:
    timeout_s, workers = json.loads(line)
    pids = []
    for argv, env, cwd, output, first in workers:
        if pid := os.fork():
            pids.append(pid)
            continue
        signal.alarm(timeout_s)
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        for fd, path in enumerate([os.devnull, output + ".out", output + ".err"]):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), fd)
        sys.argv = argv
        sys.path.insert(0, os.path.dirname(os.path.realpath(argv[0])))
        try:
            exec(first)
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.exit()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""


@dataclass(frozen=True)
class Run:
    """Exit codes (-14 means killed, because it hung) and stderr of n workers by rank, and their log_dir."""

    codes: list[int]
    errors: list[str]
    log_dir: Path

    @property
    def dir(self) -> Path:
        [folder] = self.log_dir.iterdir()
        return folder

    @property
    def log(self) -> list[str]:
        return (self.dir / "train.log").read_text().splitlines()

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.dir / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> list[tuple[float, float]]:
        return [(metrics["val_loss"], metrics["train_loss"]) for metrics in self.metrics]


class Launcher:
    """Starts train.py in folders of their own, each the working directory of one run, beside one small corpus."""

    def __init__(self, folder: Path, server: "subprocess.Popen[str]") -> None:
        self.folder, self.server = folder, server
        self.undisturbed: dict[tuple[object, ...], Run] = {}
        self.config = folder / "small.toml"
        self.config.write_text(CONFIG)
        self.corpus = folder / "sotu"
        self.corpus.mkdir()
        rng = np.random.default_rng(0)
        for split, n_tokens in (("train", 4000), ("val", 1000)):  # skewed, so that there is something to learn
            ids = rng.zipf(1.5, n_tokens).clip(1, VOCAB_SIZE) - 1
            ids.astype("<u2").tofile(self.corpus / f"{split}.bin")

    def place(self) -> Path:
        """Make the working directory of a run."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def arguments(self, config: Path | None, overrides: tuple[str, ...], train_py: Path = TRAIN_PY) -> list[str]:
        return [str(train_py), str(config or self.config), f"data_dir={self.corpus}", *overrides]

    def environment(self, place: Path, env: dict[str, str] | None) -> dict[str, str]:
        """Return our environment without the variables of a cluster, a torchrun or a login around these tests."""
        foreign = re.compile(r"WANDB|SLURM|TORCHELASTIC|MASTER_|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)")
        ours = {key: value for key, value in os.environ.items() if not foreign.match(key)}
        return {**ours, "HOME": str(place), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})}

    def run(
        self,
        *overrides: str,
        n: int = 1,
        nodes: int = 1,
        config: Path | None = None,
        env: dict[str, str] | None = None,
        last_rank: tuple[str, ...] = (),
        first: str = "",
        train_py: Path = TRAIN_PY,
        timeout_s: int = 60,
    ) -> Run:
        """Run n workers. last_rank: more overrides, of the last rank; first: Python that each runs before train.py."""
        place = self.place()
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun does
        workers = []
        for rank in range(n):
            variables = self.environment(place, env)
            if n > 1:
                variables |= {"RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank % (n // nodes))}
                variables |= {"LOCAL_WORLD_SIZE": str(n // nodes), "MASTER_ADDR": "127.0.0.1"}
                variables |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
                variables |= {"TORCHELASTIC_RESTART_COUNT": "0"}
            argv = self.arguments(config, overrides + (last_rank if rank == n - 1 else ()), train_py)
            workers.append([argv, variables, str(place), str(place / f"rank{rank}"), first])
        assert self.server.stdin and self.server.stdout  # noqa: PT018
        self.server.stdin.write(json.dumps([timeout_s, workers]) + "\n")
        self.server.stdin.flush()
        assert select.select([self.server.stdout], [], [], timeout_s + 20)[0], "the server of the workers hangs"
        codes = json.loads(self.server.stdout.readline())
        return Run(codes, [(place / f"rank{rank}.err").read_text() for rank in range(n)], place / "log")

    def compare_with(self, *overrides: str, n: int = 1, nodes: int = 1) -> Run:
        """Return a successful run that only those read who compare with it: the same one for the same arguments."""
        key = (*overrides, n, nodes)
        if key not in self.undisturbed:
            self.undisturbed[key] = self.run(*overrides, n=n, nodes=nodes)
        run = self.undisturbed[key]
        assert run.codes == [0] * n, run.errors
        return run

    def start(
        self, *overrides: str, n: int | None = None, config: Path | None = None, env: dict[str, str] | None = None
    ) -> "tuple[subprocess.Popen[str], Path]":
        """Start a run in fresh processes: under torchrun if n is given, else `python train.py`. Returns its log_dir."""
        place = self.place()
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n else []
        command = [sys.executable, *launcher, *self.arguments(config, overrides)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, cwd=place, env=self.environment(place, env), stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )
        return process, place / "log"


def finish(process: "subprocess.Popen[str]", log_dir: Path, timeout_s: float = 100) -> Run:
    with process:
        try:
            _, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its workers too
            raise
    return Run([process.returncode], [errors], log_dir)


def free_port() -> int:
    """Return a free port below those that the system gives out, so that no other connection gets it by chance."""
    for port in range(21_000 + os.getpid() % 5000, 32_768):
        with socket.socket() as free:
            try:
                free.bind(("localhost", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


def timeless(run: Run) -> list[dict[str, Any]]:
    """Return the metrics that do not depend on the clock, of a run that succeeded."""
    assert run.codes == [0] * len(run.codes), run.errors
    return without_times(run)


def without_times(run: Run) -> list[dict[str, Any]]:
    return [{key: value for key, value in m.items() if key not in TIMES} for m in run.metrics]
