"""scripts/16xA100.sh and d-16xA100.sh, run by bash where srun and scontrol only write down how they were called."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
NAMES = ["16xA100.sh", "d-16xA100.sh"]
TORCHRUN = "/bin/true"  # any program: srun does not start it here
EPHEMERAL_PORTS_FROM = 32768  # Linux: net.ipv4.ip_local_port_range

FAKE_SRUN = """#!/usr/bin/env bash
printf '%s\\0' "$@" >"$RECORD/srun"
printf '%s' "$PWD" >"$RECORD/folder"
printf '%s' "$OMP_NUM_THREADS" >"$RECORD/threads"
stop() { echo "$1" >>"$RECORD/signals"; exit "${SRUN_EXIT_CODE:-0}"; }
trap 'stop USR1' USR1
trap 'stop TERM' TERM
touch "$RECORD/running"
for ((i = 0; i < 200; i++)); do [ -n "${UNTIL_STOPPED:-}" ] && sleep 0.05; done
exit "${SRUN_EXIT_CODE:-0}"
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
if [ "$1" = requeue ]; then echo "$*" >>"$RECORD/requeued"; exit; fi
[ "$*" = "show hostnames node[3-6]" ] || exit 1
printf 'node%s\\n' 3 4 5 6
"""

pytestmark = pytest.mark.parametrize("name", NAMES)


def start(tmp_path: Path, name: str, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
    """Start a script as SLURM does: as a copy in a spool folder, with the variables of a job of 4 nodes x 4 GPUs."""
    programs, spool = tmp_path / "bin", tmp_path / "spool"
    for folder in (programs, spool):
        folder.mkdir(exist_ok=True)
    for program, text in {"srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL}.items():
        (programs / program).write_text(text)
        (programs / program).chmod(0o755)
    copy = spool / "slurm_script"
    copy.write_text((SCRIPTS / name).read_text())
    job = {
        "SLURM_JOB_ID": "3197816",
        "SLURM_JOB_NODELIST": "node[3-6]",
        "SLURM_JOB_NUM_NODES": "4",
        "SLURM_GPUS_ON_NODE": "8",  # the whole node, where SLURM does not share nodes between jobs
        "SLURM_GPUS_PER_NODE": "4",
        "SLURM_CPUS_PER_TASK": "32",
        "SLURM_SUBMIT_DIR": str(SCRIPTS.parent),
    }
    env = {"PATH": f"{programs}:{os.environ['PATH']}", "RECORD": str(tmp_path), **job, **variables}
    command, pipe = ["bash", str(copy), *arguments], subprocess.PIPE
    return subprocess.Popen(command, env=env, cwd=spool, stdout=pipe, stderr=pipe, text=True)


def end(script: "subprocess.Popen[str]") -> subprocess.CompletedProcess[str]:
    stdout, stderr = script.communicate(timeout=20)
    return subprocess.CompletedProcess(script.args, script.returncode, stdout, stderr)


def sbatch(tmp_path: Path, name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return end(start(tmp_path, name, *(arguments or (TORCHRUN, "config/a.toml")), **variables))


def signalled(tmp_path: Path, name: str, number: signal.Signals, **variables: str) -> tuple[int, list[str], list[str]]:
    """Signal a script while srun runs. Return its exit code, the signals that reached srun, and the requeue calls."""
    script = start(tmp_path, name, TORCHRUN, "config/a.toml", UNTIL_STOPPED="1", **variables)
    while not ((tmp_path / "running").exists() and catches(script.pid, signal.SIGUSR1, signal.SIGTERM)):
        assert script.poll() is None
        time.sleep(0.05)
    script.send_signal(number)
    return end(script).returncode, lines_of(tmp_path / "signals"), lines_of(tmp_path / "requeued")


def catches(pid: int, *numbers: signal.Signals) -> bool:
    """Return whether the process has handlers for these signals (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = (int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:"))
    return all(mask >> (number - 1) & 1 for number in numbers)


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def recorded(tmp_path: Path) -> tuple[list[str], list[str], list[str]]:
    """Return srun's own options, torchrun's options, and the words from train.py on."""
    words = (tmp_path / "srun").read_text().split("\0")[:-1]
    i, j = words.index(TORCHRUN), words.index("train.py")
    return words[:i], words[i + 1 : j], words[j:]


def endpoint(tmp_path: Path) -> tuple[str, int]:
    (option,) = (word for word in recorded(tmp_path)[1] if word.startswith("--rdzv_endpoint="))
    host, port = option.removeprefix("--rdzv_endpoint=").split(":")
    return host, int(port)


def directives(name: str) -> dict[str, str]:
    """The script's own #SBATCH options, as far as SLURM reads them: up to the first command."""
    lines = (SCRIPTS / name).read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line.removeprefix("#SBATCH --") for line in lines[:first_command] if line.startswith("#SBATCH ")]
    assert sum(line.startswith("#SBATCH") for line in lines) == len(options)
    return {key: value for key, _, value in (option.partition("=") for option in options)}


def test_twins_ask_for_the_same_four_nodes(name: str) -> None:
    options, twin = directives(name), directives(NAMES[1 - NAMES.index(name)])
    assert options.pop("job-name") != twin.pop("job-name")
    assert options == twin
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == ("4", "1", "4")
    assert int(options["cpus-per-task"]) >= 4  # without it SLURM gives one core to the workers of a node
    assert options["output"] == "log/%j.out"  # log/%j/... is not there yet when SLURM opens it
    assert options["open-mode"] == "append"  # or a requeued job empties its log
    assert "requeue" in options  # also by SLURM itself, when a node goes down
    assert options["signal"] == "B:USR1@300"  # to the script alone: it tells the workers


def test_starts_torchrun_once_per_node(tmp_path: Path, name: str) -> None:
    run = sbatch(tmp_path, name, SLURM_JOB_NUM_NODES="2", OMP_NUM_THREADS="5")
    assert (run.returncode, run.stderr) == (0, "")
    of_srun, of_torchrun, _ = recorded(tmp_path)
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=32"} <= set(of_srun)
    assert "--kill-on-bad-exit=1" in of_srun
    assert {"--nnodes=2", "--rdzv_backend=c10d", "--rdzv_id=3197816"} <= set(of_torchrun)
    assert endpoint(tmp_path)[0] == "node3"
    assert (tmp_path / "threads").read_text() == "5"


def test_every_argument_stays_one_word(tmp_path: Path, name: str) -> None:
    arguments = ["my configs/a.toml", "train.n_steps=100", "train.optim.betas=[0.9, 0.95]", "log_dir=*", 'dataset="x"']
    sbatch(tmp_path, name, TORCHRUN, *arguments)
    assert recorded(tmp_path)[2] == ["train.py", *arguments]


def test_runs_in_the_submission_folder_and_shares_the_cores(tmp_path: Path, name: str) -> None:
    sbatch(tmp_path, name)
    assert (tmp_path / "folder").read_text() == str(SCRIPTS.parent)
    assert (tmp_path / "threads").read_text() == "8"  # 32 cores, 4 workers


def test_jobs_meet_at_different_reserved_ports(tmp_path: Path, name: str) -> None:
    ports: list[int] = []
    for job_id in (1, 2, 9_999, 10_000, 67_043_327):
        sbatch(tmp_path, name, SLURM_JOB_ID=str(job_id))
        ports.append(endpoint(tmp_path)[1])
    assert len(set(ports)) == len(ports)
    assert all(1024 <= port < EPHEMERAL_PORTS_FROM for port in ports)


@pytest.mark.parametrize(("asked", "workers"), [("3", 3), ("a100:2", 2)])
def test_starts_a_worker_for_each_gpu(tmp_path: Path, name: str, asked: str, workers: int) -> None:
    assert sbatch(tmp_path, name, SLURM_GPUS_PER_NODE=asked).returncode == 0
    assert f"--nproc_per_node={workers}" in recorded(tmp_path)[1]


@pytest.mark.parametrize("exit_code", [0, 1, 137])
def test_finished_run_gives_its_exit_code_and_is_not_requeued(tmp_path: Path, name: str, exit_code: int) -> None:
    assert sbatch(tmp_path, name, SRUN_EXIT_CODE=str(exit_code)).returncode == exit_code
    assert lines_of(tmp_path / "requeued") == []


def test_time_limit_stops_workers_and_requeues_once(tmp_path: Path, name: str) -> None:
    assert signalled(tmp_path, name, signal.SIGUSR1) == (0, ["USR1"], ["requeue 3197816"])


def test_cancelled_job_stops_workers_and_is_not_requeued(tmp_path: Path, name: str) -> None:
    assert signalled(tmp_path, name, signal.SIGTERM) == (0, ["USR1"], [])


@pytest.mark.parametrize("exit_code", [2, 143])  # 143 also says that a trapped SIGTERM has ended bash's wait
def test_run_that_fails_while_stopping_is_not_requeued(tmp_path: Path, name: str, exit_code: int) -> None:
    assert signalled(tmp_path, name, signal.SIGUSR1, SRUN_EXIT_CODE=str(exit_code)) == (exit_code, ["USR1"], [])


def test_torchrun_survives_the_signal_to_stop(tmp_path: Path, name: str) -> None:
    sbatch(tmp_path, name)
    words = recorded(tmp_path)[0]
    on_a_node = [*words[words.index("bash") :], "bash", "-c", "kill -USR1 $$; echo alive"]
    assert subprocess.run(on_a_node, capture_output=True, text=True, timeout=20, check=False).stdout == "alive\n"


def test_unknown_hosts_start_nothing(tmp_path: Path, name: str) -> None:
    assert sbatch(tmp_path, name, SLURM_JOB_NODELIST="node[7-8]").returncode != 0
    assert not (tmp_path / "srun").exists()


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        ([], {}),
        ([TORCHRUN], {}),
        (["config/a.toml"], {}),  # `which torchrun` found nothing
        (["config/a.toml", "train.n_steps=100"], {}),
        ([TORCHRUN, "config/a.toml"], {"SLURM_JOB_ID": ""}),  # started by bash, not by sbatch
    ],
)
def test_invalid_start_gives_one_line_of_usage(
    tmp_path: Path, name: str, arguments: list[str], variables: dict[str, str]
) -> None:
    run = end(start(tmp_path, name, *arguments, **variables))
    assert run.returncode == 2
    assert run.stderr.startswith("usage: sbatch ")
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "srun").exists()
