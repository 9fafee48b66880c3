"""scripts/16xA100.sh and d-16xA100.sh, unchanged, on a real SLURM of this machine: bash scripts/test_slurm.sh

A job is `sbatch scripts/16xA100.sh` with a tiny configuration; options of sbatch shrink its nodes.
"""

import json
import re
import shutil
import signal
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from scripts.lab.slurm import LabError, SlurmLab, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2000)]

N_STEPS = 500
CONFIG = f"""
dataset = "sotu"
in_memory = false
[log]
wandb_log = false
eval_interval = 100
eval_steps = 2
[train]
topology = "alternating-exp-ring"
global_batch_size = 16
context_length = 32
n_steps = {N_STEPS}
timeout_s = 60
compile = false
[train.optim]
accum_steps = 3
[train.lr_schedule]
warmup_steps = 20
[model]
n_layers = 1
n_heads = 1
n_embd = 32
dropout = 0.1
"""
SHRUNK = ("--gpus-per-node=A100:2", "--cpus-per-task=2")  # 16 workers take too long on a few cores
BACKENDS = {"d-16xA100.sh": (), "16xA100.sh": ("train.backend=pytorchddp", "train.optim.name=adamw")}
WORKER = "python.* train.py"  # pattern of command lines; torchrun's matches as well
PATIENCE_S = 300  # limit for events that take a minute on two idle cores
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
UNTIMED = ("step", "val_loss", "train_loss", "lr", "consensus_distance")  # keys of metrics.jsonl


class Job:
    """A submitted script. Its output and run directory are in `folder`."""

    def __init__(
        self, lab: SlurmLab, folder: Path, script: str, *overrides: str, options: tuple[str, ...] = SHRUNK
    ) -> None:
        self._lab, self.script = lab, script
        sbatch = ["sbatch", "--parsable", "--account=project", f"--output={folder}/%j.out", *options]
        arguments = [str(folder / "config.toml"), f"log_dir={folder}", *BACKENDS[script], *overrides]
        torchrun = shutil.which("torchrun")
        assert torchrun is not None
        self.id = lab.slurm(*sbatch, f"scripts/{script}", torchrun, *arguments).strip()
        self._output, self.run_dir = folder / f"{self.id}.out", folder / self.id

    def log(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def show(self) -> dict[str, str]:
        """SLURM's record of the job: JobState, Restarts, Reason, ExitCode, NodeList, ..."""
        words = self._lab.slurm("scontrol", "-o", "show", "job", self.id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_log(self, pattern: str) -> None:
        wait_for(lambda: pattern in self.log() or self.show()["JobState"] in ENDS, PATIENCE_S)
        assert pattern in self.log()

    def end(self, state: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait for the end of the job, in this state. A requeued job would wait for two minutes: start it at once."""

        def ended() -> bool:
            job = self.show()
            if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime":
                time.sleep(2)  # within a second of the requeue SLURM refuses the job's credentials
                self._lab.slurm("scontrol", "update", f"jobid={self.id}", "StartTime=now")
            return job["JobState"] in ENDS

        assert wait_for(ended, timeout_s), f"job {self.id} has not ended after {timeout_s} s:\n{self.log()}"
        assert self.show()["JobState"] == state, self.log()

    def metrics(self) -> list[dict[str, float]]:
        """The evaluations, without what depends on the clock."""
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key in UNTIMED} for line in lines]

    def saved(self) -> list[int]:
        """Steps after which it saved on request."""
        return [int(step) for step in re.findall(r"Asked to stop: ends after step (\d+)", self.log())]

    def resumed(self) -> list[int]:
        """Steps from which it resumed."""
        return [int(step) for step in re.findall(r"Resumed from \S+: step (\d+)", self.log())]

    def assert_resumed_once_where_it_saved(self) -> None:
        assert len(self.saved()) == 1, self.log()
        assert self.resumed() == self.saved()
        assert self.show()["Restarts"] == "1"


class Cluster:
    """Five nodes, and the jobs that are submitted to them."""

    def __init__(self, lab: SlurmLab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self.losses_of = cache(self._losses_of)  # by script
        (folder / "config.toml").write_text(CONFIG)

    def submit(self, script: str, *overrides: str, options: tuple[str, ...] = SHRUNK) -> Job:
        return Job(self.lab, self.folder, script, *overrides, options=options)

    def _losses_of(self, script: str) -> list[dict[str, float]]:
        """Metrics of a run that is never disturbed."""
        job = self.submit(script)
        job.end("COMPLETED")
        assert job.show()["Restarts"] == "0"
        return job.metrics()

    def wait_for_no_workers(self) -> None:
        def left() -> list[str]:
            return [f"{node}: {line}" for node in self.lab.nodes for line in self.lab.processes(node, WORKER)]

        assert wait_for(lambda: not left(), 60), f"still running: {left()}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    previous = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("told to stop", 143))  # takes the cluster down
    try:
        with SlurmLab(n_nodes=5) as lab:
            yield Cluster(lab, tmp_path_factory.mktemp("slurm"))
    except LabError as error:
        pytest.exit(f"no cluster: {error}", 2)  # not skipped, for these tests run on request only
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_16_workers_on_4_nodes_train_to_the_end(cluster: Cluster) -> None:
    job = cluster.submit("16xA100.sh", "train.n_steps=30", "log.eval_interval=15", options=())
    job.end("COMPLETED")
    assert "16 workers, 4 on each node, cpu" in job.log()
    assert [metrics["step"] for metrics in job.metrics()] == [15, 30]


def test_decentralized_workers_learn_on_4_nodes(cluster: Cluster) -> None:
    losses = [metrics["val_loss"] for metrics in cluster.losses_of("d-16xA100.sh")]
    assert len(losses) == N_STEPS // 100
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("script", BACKENDS)
def test_time_limit_does_not_change_the_losses(cluster: Cluster, script: str) -> None:
    job = cluster.submit(script, options=(*SHRUNK, "--time=2", "--signal=B:USR1@60"))
    job.end("COMPLETED", timeout_s=3 * PATIENCE_S)  # after one sbatch, however often the limit comes
    assert job.saved(), f"{N_STEPS} steps were done before the time limit came: raise N_STEPS"
    assert len(job.resumed()) == int(job.show()["Restarts"])
    # The limit may come when the run has just reached its end: then it is started once more, for nothing.
    assert job.resumed() in (job.saved(), [*job.saved(), N_STEPS])
    assert job.metrics() == cluster.losses_of(script)


def test_cancelled_job_saves_and_another_takes_it_up(cluster: Cluster) -> None:
    job = cluster.submit("d-16xA100.sh")
    job.wait_for_log("Step 100,")
    cluster.lab.slurm("scancel", job.id)
    job.end("CANCELLED")
    cluster.wait_for_no_workers()
    (step,) = job.saved()
    assert (job.run_dir / f"checkpoint/step-{step:09d}").exists()
    heir = cluster.submit("d-16xA100.sh", f"log.run_name={job.id}")
    heir.end("COMPLETED")
    assert heir.resumed() == [step]
    assert job.metrics() == cluster.losses_of("d-16xA100.sh")


def test_crashed_node_is_replaced(cluster: Cluster) -> None:
    job = cluster.submit("d-16xA100.sh")
    job.wait_for_log("Saved checkpoint step-000000100")
    assert cluster.lab.processes("node3", WORKER)
    cluster.lab.crash("node3")
    assert wait_for(lambda: job.show()["JobState"] != "RUNNING", PATIENCE_S), "SLURM did not notice the crash"
    job.end("COMPLETED")
    cluster.lab.boot("node3")
    cluster.lab.wait_for_nodes()
    assert job.show()["Restarts"] == "1"
    assert len(job.resumed()) == 1
    assert job.metrics() == cluster.losses_of("d-16xA100.sh")


def test_drained_node_is_replaced(cluster: Cluster) -> None:
    job = cluster.submit("d-16xA100.sh")
    job.wait_for_log("Step 100,")
    cluster.lab.slurm("scontrol", "update", "nodename=node3", "state=drain", "reason=maintenance")
    cluster.lab.slurm("scontrol", "requeue", job.id)
    try:
        job.end("COMPLETED")
    finally:
        cluster.lab.slurm("scontrol", "update", "nodename=node3", "state=resume")
    assert "node3" not in cluster.lab.slurm("scontrol", "show", "hostnames", job.show()["NodeList"]).split()
    job.assert_resumed_once_where_it_saved()
    assert job.metrics() == cluster.losses_of("d-16xA100.sh")


def test_preempted_job_resumes_after_the_urgent_one(cluster: Cluster) -> None:
    job = cluster.submit("16xA100.sh")
    job.wait_for_log("Step 100,")
    urgent = ("--partition=urgent", "--account=project", "--nodes=5", "--ntasks-per-node=1", "--exclusive")
    cluster.lab.slurm("srun", *urgent, "true")
    job.end("COMPLETED")
    job.assert_resumed_once_where_it_saved()
    assert job.metrics() == cluster.losses_of("16xA100.sh")


def test_killed_worker_fails_the_job(cluster: Cluster) -> None:
    job = cluster.submit("d-16xA100.sh")
    job.wait_for_log("Step 100,")
    victim = next(line for line in cluster.lab.processes("node2", WORKER) if "torchrun" not in line)
    cluster.lab.kill("node2", victim.split()[0])
    job.end("FAILED", timeout_s=120)
    cluster.wait_for_no_workers()
    assert job.show()["Restarts"] == "0"


def test_mistake_in_the_configuration_fails_the_job(cluster: Cluster) -> None:
    job = cluster.submit("16xA100.sh", "train.global_batch_size=17")
    job.end("FAILED")
    assert "train.global_batch_size = 17 is not divisible by 8 workers" in job.log()
    assert job.show()["Restarts"] == "0"
