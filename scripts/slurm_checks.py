"""What test_slurm.sh checks: each of the functions below named check_... submits jobs and says what it saw.

A job is `sbatch scripts/16xA100.sh` or d-16xA100.sh with a tiny configuration; options of sbatch shrink its nodes.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.slurm_lab import LabError, SlurmLab, wait_for

ROOT = Path(__file__).resolve().parents[1]
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
SHRUNK = ["--gpus-per-node=A100:2", "--cpus-per-task=2"]  # 16 workers take too long on a few cores
WORKER = "python.* train.py"  # torchrun's command line matches as well
PATIENCE_S = 300  # for what takes a minute on two idle cores
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")  # of jobs
UNTIMED = ("step", "val_loss", "train_loss", "lr", "consensus_distance")  # keys of metrics.jsonl
SUMMARY = re.compile(r"INFO\] (Restart number|Resumed|Asked|Saved checkpoint|Step)|ERROR|error:|CANCELLED|rank \d+:")


BACKENDS = {"d-16xA100.sh": (), "16xA100.sh": ("train.backend=pytorchddp", "train.optim.name=adamw")}


class CheckError(AssertionError):
    """Something is not as it should be; the message says what was seen."""


class Job:
    """A submitted script. Its output and run directory are in `folder`."""

    def __init__(self, lab: SlurmLab, folder: Path, script: str, *overrides: str, options: list[str] = SHRUNK) -> None:
        self._lab = lab
        torchrun = shutil.which("torchrun")
        require(torchrun is not None, "torchrun is not in PATH")
        command = ["sbatch", "--parsable", "--account=project", f"--output={folder}/%j.out", *options]
        arguments = [str(folder / "config.toml"), f"log_dir={folder}", *BACKENDS[script], *overrides]
        self.script = script
        self.id = lab.slurm(*command, f"scripts/{script}", str(torchrun), *arguments).strip()
        self._output, self.run_dir = folder / f"{self.id}.out", folder / self.id

    def log(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def show(self) -> dict[str, str]:
        """What SLURM knows of it: JobState, Restarts, Reason, ExitCode, NodeList, ..."""
        words = self._lab.slurm("scontrol", "-o", "show", "job", self.id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_log(self, pattern: str) -> "re.Match[str]":
        wait_for(lambda: re.search(pattern, self.log()) is not None or self._ended(), PATIENCE_S)
        found = re.search(pattern, self.log())
        if found is None:
            raise CheckError(f'"{pattern}" is not in the log after {PATIENCE_S} s or the end of the job:\n{self.log()}')
        return found

    def wait_for_end(self, timeout_s: float = PATIENCE_S) -> str:
        """The state in which it ended. A requeued job would wait for two minutes: it starts again now."""

        def ended() -> bool:
            job = self.show()
            if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime":
                time.sleep(2)  # within a second of the requeue SLURM refuses the job's credentials
                self._lab.slurm("scontrol", "update", f"jobid={self.id}", "StartTime=now")
            return self._ended()

        require(wait_for(ended, timeout_s), f"job {self.id} has not ended after {timeout_s} s:\n{self.log()}")
        return self.show()["JobState"]

    def _ended(self) -> bool:
        return self.show()["JobState"] in ENDS

    def metrics(self) -> list[dict[str, float]]:
        """What does not depend on the clock."""
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key in UNTIMED} for line in lines]

    def saved_and_resumed(self) -> tuple[list[int], list[int]]:
        """Steps after which it saved on request, and from which it went on."""
        saved = re.findall(r"Asked to stop: ends after step (\d+)", self.log())
        resumed = re.findall(r"Resumed from \S+: step (\d+)", self.log())
        return [int(step) for step in saved], [int(step) for step in resumed]

    def summary(self) -> str:
        return "".join(f"      {line}\n" for line in self.log().splitlines() if SUMMARY.search(line))


class Checks:
    """The cluster, and the run that was never disturbed, with which the others are compared."""

    def __init__(self, lab: SlurmLab, folder: Path) -> None:
        self._lab, self._folder = lab, folder
        self._undisturbed: dict[str, list[dict[str, float]]] = {}  # by script
        (folder / "config.toml").write_text(CONFIG)

    def check_all_reduce(self) -> str:
        """16xA100.sh as it is, with 4 x 4 workers, trains to the end."""
        job = Job(self._lab, self._folder, "16xA100.sh", "train.n_steps=30", "log.eval_interval=15", options=[])
        self._require_end(job, "COMPLETED")
        require("16 workers, 4 on each node, cpu" in job.log(), job.log())
        require(len(job.metrics()) == 2, f"metrics.jsonl: {job.metrics()}")
        return "16 workers on 4 nodes, 30 steps"

    def check_decentralized(self) -> str:
        """d-16xA100.sh, with 4 x 2 workers, trains to the end."""
        losses = self.undisturbed("d-16xA100.sh")
        return f"8 workers on 4 nodes, val_loss {losses[-1]['val_loss']:.6f} after {N_STEPS} steps"

    def check_time_limit(self) -> str:
        """The time limit comes, once or more often: one sbatch, and the losses of a run without a limit."""
        return self._reach_the_time_limit("d-16xA100.sh")

    def check_time_limit_all_reduce(self) -> str:
        """The same with 16xA100.sh."""
        return self._reach_the_time_limit("16xA100.sh")

    def _reach_the_time_limit(self, script: str) -> str:
        job = Job(self._lab, self._folder, script, options=[*SHRUNK, "--time=2", "--signal=B:USR1@60"])
        self._require_end(job, "COMPLETED", timeout_s=3 * PATIENCE_S)
        saved, resumed = job.saved_and_resumed()
        require(saved != [], f"{N_STEPS} steps were done before the time limit came: raise N_STEPS\n{job.log()}")
        require(len(resumed) == int(job.show()["Restarts"]), f"{job.show()['Restarts']} restarts:\n{job.summary()}")
        # The limit may come when the run has just reached its end: then it is started once more, for nothing.
        require(resumed in (saved, [*saved, N_STEPS]), f"saved: {saved}, went on from: {resumed}")
        self._require_same_losses(job)
        return f"went on from steps {resumed}, losses equal bit by bit\n{job.summary()}"

    def check_cancel(self) -> str:
        """A cancelled job saves, leaves nothing behind, is not requeued, and can be taken up by another."""
        job = Job(self._lab, self._folder, "d-16xA100.sh")
        job.wait_for_log("Step 100,")
        begin = time.monotonic()
        self._lab.slurm("scancel", job.id)
        self._require_end(job, "CANCELLED")
        self._require_nothing_left()
        took_s = time.monotonic() - begin
        saved, _ = job.saved_and_resumed()
        require(len(saved) == 1, job.log())
        require((job.run_dir / f"checkpoint/step-{saved[0]:09d}").exists(), f"no checkpoint of step {saved[0]}")
        heir = Job(self._lab, self._folder, "d-16xA100.sh", f"log.run_name={job.id}")
        heir.run_dir = job.run_dir
        self._require_end(heir, "COMPLETED")
        require(heir.saved_and_resumed()[1] == saved, heir.log())
        self._require_same_losses(heir)
        return f"saved after step {saved[0]}, all gone after {took_s:.0f} s; another job went on from there"

    def check_crash(self) -> str:
        """A node loses its power: SLURM requeues the job, which goes on with another node from the last checkpoint."""
        job = Job(self._lab, self._folder, "d-16xA100.sh")
        job.wait_for_log("Saved checkpoint step-000000100")
        node = "node3"
        require(self._lab.processes(node, WORKER) != [], f"no worker on {node}")
        self._lab.crash(node)
        begin = time.monotonic()
        require(wait_for(lambda: job.show()["JobState"] != "RUNNING", PATIENCE_S), "SLURM did not notice the crash")
        noticed_s = time.monotonic() - begin
        self._require_end(job, "COMPLETED")
        require(job.show()["Restarts"] == "1", str(job.show()))
        require(len(job.saved_and_resumed()[1]) == 1, job.log())
        self._require_same_losses(job)
        self._lab.boot(node)
        self._lab.wait_for_nodes()
        step, nodes = job.saved_and_resumed()[1][0], job.show()["NodeList"]
        return f"noticed after {noticed_s:.0f} s, went on from step {step} on {nodes}"

    def check_drain(self) -> str:
        """A node is drained and the job requeued, as for maintenance: it saves, and goes on with another node."""
        job = Job(self._lab, self._folder, "d-16xA100.sh")
        job.wait_for_log("Step 100,")
        self._lab.slurm("scontrol", "update", "nodename=node3", "state=drain", "reason=maintenance")
        self._lab.slurm("scontrol", "requeue", job.id)
        self._require_end(job, "COMPLETED")
        nodes = job.show()["NodeList"]
        self._lab.slurm("scontrol", "update", "nodename=node3", "state=resume")
        require("3" not in self._lab.slurm("scontrol", "show", "hostnames", nodes), f"went on on {nodes}")
        return self._require_saved_and_gone_on(job) + f" on {nodes}"

    def check_preemption(self) -> str:
        """A more urgent job needs the nodes: this one, of 16xA100.sh, saves, waits, and goes on after it."""
        job = Job(self._lab, self._folder, "16xA100.sh")
        job.wait_for_log("Step 100,")
        urgent = ["--partition=urgent", "--account=project", f"--nodes={len(self._lab.nodes)}", "--exclusive"]
        command = ["srun", "--ntasks-per-node=1", *urgent, "sleep", "5"]
        self._lab.slurm(*command)
        self._require_end(job, "COMPLETED")
        return self._require_saved_and_gone_on(job)

    def check_kill(self) -> str:
        """kill -9 of one worker: the job fails soon, is not requeued, and no worker is left."""
        job = Job(self._lab, self._folder, "d-16xA100.sh")
        job.wait_for_log("Step 100,")
        victim = next(line for line in self._lab.processes("node2", WORKER) if "torchrun" not in line)
        self._lab.kill("node2", victim.split()[0])
        begin = time.monotonic()
        self._require_end(job, "FAILED", timeout_s=120)
        self._require_nothing_left()
        took_s = time.monotonic() - begin
        return f"FAILED, exit code {job.show()['ExitCode']}, all gone after {took_s:.0f} s\n{job.summary()}"

    def check_mistake(self) -> str:
        """A run that cannot start fails with a line that says why, and is not requeued."""
        job = Job(self._lab, self._folder, "16xA100.sh", "train.global_batch_size=17")
        self._require_end(job, "FAILED")
        require("train.global_batch_size = 17 is not divisible by 8 workers" in job.log(), job.log())
        return f"FAILED, exit code {job.show()['ExitCode']}, {job.show()['Restarts']} restarts"

    # ---

    def undisturbed(self, script: str) -> list[dict[str, float]]:
        """The losses of a run of this script."""
        if script not in self._undisturbed:
            job = Job(self._lab, self._folder, script)
            self._require_end(job, "COMPLETED")
            require(job.show()["Restarts"] == "0", str(job.show()))
            self._undisturbed[script] = job.metrics()
        return self._undisturbed[script]

    def _require_end(self, job: Job, state: str, timeout_s: float = PATIENCE_S) -> None:
        ended = job.wait_for_end(timeout_s)
        require(ended == state, f"job {job.id} ended as {ended}, not {state}:\n{job.log()}")

    def _require_same_losses(self, job: Job) -> None:
        found, wanted = job.metrics(), self.undisturbed(job.script)
        require(found == wanted, f"{found}\nwithout an interruption:\n{wanted}")

    def _require_saved_and_gone_on(self, job: Job) -> str:
        """Once, at the step at which it was asked to stop."""
        saved, resumed = job.saved_and_resumed()
        require(len(saved) == 1 and resumed == saved, f"saved: {saved}, went on from: {resumed}\n{job.log()}")
        require(job.show()["Restarts"] == "1", str(job.show()))
        self._require_same_losses(job)
        return f"saved after step {saved[0]} and went on from there"

    def _require_nothing_left(self) -> None:
        def left() -> list[str]:
            return [f"{node}: {line}" for node in self._lab.nodes for line in self._lab.processes(node, WORKER)]

        wait_for(lambda: not left(), 60)
        require(not left(), f"still running: {left()}")


def require(condition: bool, seen: str) -> None:
    if not condition:
        raise CheckError(seen)


def main() -> int:
    """Exit code: 0 when all checks pass, 1 when one fails, 2 when there can be no cluster."""
    names = [name.removeprefix("check_") for name in vars(Checks) if name.startswith("check_")]
    docs = "\n".join(f"  {name:15}{getattr(Checks, f'check_{name}').__doc__}" for name in names)
    parser = argparse.ArgumentParser(
        prog="test_slurm.sh", description=docs, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checks", nargs="*", metavar="CHECK", help="default: all")
    chosen = parser.parse_args().checks or names
    if unknown := set(chosen) - set(names):
        parser.error(f"no check {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is taken down
    os.chdir(ROOT)
    folder = Path(tempfile.mkdtemp(prefix="test-slurm-"))
    failed: list[str] = []
    try:
        with SlurmLab(n_nodes=5) as lab:
            checks = Checks(lab, folder)
            for name in chosen:
                if not passes(checks, name):
                    failed.append(name)
    except LabError as error:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if failed:
        print(f"{len(failed)} of {len(chosen)} failed: {', '.join(failed)}; the logs are in {folder}")
        return 1
    shutil.rmtree(folder)
    print(f"All {len(chosen)} passed")
    return 0


def passes(checks: Checks, name: str) -> bool:
    begin = time.monotonic()
    try:
        verdict, seen = "PASS", getattr(checks, f"check_{name}")()
    except (CheckError, LabError, OSError, subprocess.TimeoutExpired) as error:
        verdict, seen = "FAIL", str(error)
    print(f"{verdict}  {name}, {time.monotonic() - begin:.0f} s: {seen}", flush=True)
    return verdict == "PASS"


if __name__ == "__main__":
    sys.exit(main())
