"""A real SLURM cluster on this machine, for tests/slurm: slurmctld, and nodes that are hosts of their own.

    with SlurmLab(n_nodes=5) as lab:
        lab.slurm("sbatch", "job.sh")

    host: slurmctld, munged, sbatch           namespaces slurmlab-node1, ...
          bridge slurmlab0 10.77.0.1  ======  eth0 10.77.0.11, slurmd, its jobs

A node has its own network, name, process table, /etc/hosts and /dev/shm; the file system is shared. GPUs, cores and
memory are only declared: SLURM counts them, nothing enforces them. All daemons are children of this process and die
with it, also when it is killed. Needs root and Debian's slurm-wlm, munge and iproute2.
"""

import ctypes
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STATE = Path("/var/lib/slurmlab")  # slurmd runs batch scripts there, which /run and /tmp may forbid
BRIDGE, NAMESPACE, CABLE = "slurmlab0", "slurmlab-{}", "slurmlab-v{}"
CONTROLLER, ADDRESS = "slurmlab-ctl", "10.77.0.{}"
GPUS_PER_NODE, CPUS_PER_NODE = 4, 128  # numbers declared to SLURM, without hardware
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "ip", "unshare", "nsenter")
PATH = f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin"
ENV = {"PATH": PATH, "SLURM_CONF": str(STATE / "slurm.conf")}
PR_SET_PDEATHSIG = 1  # Linux: prctl.h

SLURM_CONF = """\
ClusterName=slurmlab
SlurmctldHost={controller}({address})
CommunicationParameters=NoCtldInAddrAny
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={state}/munge/socket
StateSaveLocation={state}/controller
SlurmdSpoolDir={state}/spool/%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd.%n.pid
SlurmctldPort=16817
SlurmdPort=16818
SlurmctldLogFile={state}/log/slurmctld.log
SlurmdLogFile={state}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5
GresTypes=gpu
SlurmdParameters=config_overrides
JobRequeue=0
ReturnToService=2
SlurmdTimeout=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=lab Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""
# The ports are unusual, for a SLURM may run here already. JobRequeue=0: only the job's own script requeues it.
# ReturnToService=2: a crashed node is used again once it is back.

# pid 1 of a node; $1 is its name, $2 the state folder. When it ends, so do all processes of the node.
NODE_INIT = """\
hostname "$1" && mount --bind "$2/hosts" /etc/hosts || exit
mount -t tmpfs -o mode=1777 slurmlab-shm /dev/shm
slurmd -D &
slurmd=$!
while kill -0 "$slurmd" 2>/dev/null; do wait "$slurmd"; done # bash also reaps the orphans
"""


class LabError(RuntimeError):
    """The cluster cannot be built here, or does not do what it should; the message is for the user."""


class SlurmLab:
    """A cluster of n nodes for as long as its `with` block runs. Nothing of it is left afterwards."""

    def __init__(self, n_nodes: int) -> None:
        self.nodes = [f"node{i}" for i in range(1, n_nodes + 1)]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}  # by name: the nodes, slurmctld and munged

    def __enter__(self) -> "SlurmLab":
        self._check()
        self._remove()  # a killed cluster may have left something
        try:
            self._write_files()
            self._start_host()
            for node in self.nodes:
                self._plug_in(node)
                self.boot(node)
            self.wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*self.nodes, "slurmctld", "munged"):
            self.crash(name)
        self._remove()

    def slurm(self, *command: str) -> str:
        """Return the output of a command of SLURM: lab.slurm("sinfo", "-h")."""
        return _run(*command)

    def crash(self, node: str) -> None:
        """End all processes of a node at once, as a power cut does."""
        if (daemon := self._daemons.pop(node, None)) is not None:
            daemon.kill()  # `unshare --kill-child` takes a node's pid 1 along, which takes all others
            daemon.wait()

    def boot(self, node: str) -> None:
        namespace = ["ip", "netns", "exec", NAMESPACE.format(node)]
        own = ["unshare", "--uts", "--ipc", "--mount", "--propagation", "slave", "--pid", "--fork", "--mount-proc"]
        init = ["--kill-child", "bash", "-c", NODE_INIT, "bash", node, str(STATE)]
        self._start(node, [*namespace, *own, *init])

    def wait_for_nodes(self) -> None:
        """Wait until all nodes can take a job."""

        def ready() -> bool:
            return set(self.slurm("sinfo", "-h", "-N", "-o", "%T").split()) <= {"idle", "allocated", "mixed"}

        if not wait_for(ready, 90):
            log = _tail(STATE / "log" / f"slurmd.{self.nodes[0]}.log")
            raise LabError(f"SLURM's nodes are not ready:\n{self.slurm('sinfo', '-N', '-o', '%N %T %E')}{log}")

    def processes(self, node: str, pattern: str) -> list[str]:
        """Return process id and command line of the processes on a node that match a regular expression."""
        lines = self._inside(node, "ps", "-eo", "pid=,args=").splitlines()
        return [line.strip() for line in lines if re.search(pattern, line)]

    def kill(self, node: str, pid: str) -> None:
        self._inside(node, "kill", "-KILL", pid)

    def _check(self) -> None:
        if os.geteuid() != 0:
            raise LabError("needs root, to make hosts of namespaces: run it with sudo, or in a privileged container")
        if missing := [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]:
            raise LabError(f"{', '.join(missing)} not found: apt-get install slurm-wlm munge iproute2")
        if str(STATE) in _run("pgrep", "-a", "-x", "slurmctld", check=False):
            raise LabError("another cluster of this kind is up: one at a time")
        addresses = _run("ip", "-4", "-o", "addr").splitlines()
        if in_use := [line for line in addresses if ADDRESS.format("") in line and f" {BRIDGE} " not in line]:
            raise LabError(f"the addresses {ADDRESS.format('*')} are in use here: {in_use[0]}")

    def _write_files(self) -> None:
        for folder in ("log", "munge", "controller", "spool", *(f"spool/{node}" for node in self.nodes)):
            (STATE / folder).mkdir(parents=True, mode=0o755)
        (STATE / "munge" / "key").write_bytes(os.urandom(128))
        (STATE / "munge" / "key").chmod(0o400)
        for i in range(GPUS_PER_NODE):  # only device files make SLURM set CUDA_VISIBLE_DEVICES: copies of /dev/null
            os.mknod(STATE / f"nvidia{i}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        hosts = {"localhost": "127.0.0.1", f"{CONTROLLER} {socket.gethostname()}": ADDRESS.format(1)}
        hosts |= {node: self._address(node) for node in self.nodes}
        (STATE / "hosts").write_text("".join(f"{address}\t{name}\n" for name, address in hosts.items()))
        conf = SLURM_CONF.format(controller=CONTROLLER, address=ADDRESS.format(1), state=STATE)
        hardware = f"CPUs={CPUS_PER_NODE} RealMemory=256000 Gres=gpu:A100:{GPUS_PER_NODE} State=UNKNOWN"
        nodes = [f"NodeName={node} NodeAddr={self._address(node)} {hardware}" for node in self.nodes]
        (STATE / "slurm.conf").write_text("\n".join([*nodes, conf]))  # nodes first: partitions name them
        (STATE / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # or slurmd looks for one in /sys
        gpus = f"Name=gpu Type=A100 File={STATE}/nvidia[0-{GPUS_PER_NODE - 1}] Flags=nvidia_gpu_env"
        (STATE / "gres.conf").write_text(f"AutoDetect=off\n{gpus}\n")

    def _start_host(self) -> None:
        munge = STATE / "munge"
        paths = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        options = [f"--{option}={munge / name}" for option, name in paths.items()]
        self._start("munged", ["munged", "--foreground", *options])
        if not wait_for((munge / "socket").exists, 20):
            raise LabError(f"munged does not start:\n{_tail(STATE / 'log' / 'munged.out')}")
        _run("ip", "link", "add", BRIDGE, "type", "bridge", "stp_state", "0")
        _run("ip", "addr", "add", f"{ADDRESS.format(1)}/24", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")
        command = f"hostname {CONTROLLER} && mount --bind {STATE}/hosts /etc/hosts && exec slurmctld -D"
        self._start("slurmctld", ["unshare", "--uts", "--mount", "sh", "-c", command])
        if not wait_for(lambda: " is UP" in _run("scontrol", "ping", check=False), 30):
            raise LabError(f"slurmctld does not start:\n{_tail(STATE / 'log' / 'slurmctld.log')}")

    def _plug_in(self, node: str) -> None:
        namespace, cable = NAMESPACE.format(node), CABLE.format(self.nodes.index(node) + 1)
        _run("ip", "netns", "add", namespace)
        _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _run("ip", "link", "set", cable, "master", BRIDGE, "up")
        _run("ip", "-n", namespace, "addr", "add", f"{self._address(node)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run("ip", "-n", namespace, "link", "set", device, "up")

    def _address(self, node: str) -> str:
        return ADDRESS.format(11 + self.nodes.index(node))

    def _inside(self, node: str, *command: str) -> str:
        """Return the output of a command that runs among the processes of the node."""
        unshare = self._daemons[node].pid  # its child is the node's pid 1
        init = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()[0]
        return _run("nsenter", f"--target={init}", "--pid", "--mount", *command)

    def _start(self, name: str, command: list[str]) -> None:
        libc = ctypes.CDLL(None)
        with open(STATE / "log" / f"{name}.out", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=STATE,
                env={**ENV, "LANG": "C.UTF-8", "HOME": "/root"},
                start_new_session=True,  # Ctrl-C reaches the tests, which then stop the daemons
                preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
            )

    def _remove(self) -> None:
        for node in self.nodes:
            _run("ip", "link", "del", CABLE.format(self.nodes.index(node) + 1), check=False)
            _run("ip", "netns", "del", NAMESPACE.format(node), check=False)
        _run("ip", "link", "del", BRIDGE, check=False)
        shutil.rmtree(STATE, ignore_errors=True)


def wait_for(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Return whether the condition became true in that time."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _run(*command: str, check: bool = True) -> str:
    env = {**os.environ, **ENV}
    done = subprocess.run(command, input="", capture_output=True, text=True, timeout=60, cwd=ROOT, env=env, check=False)
    if check and done.returncode:
        raise LabError(f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-12:]) if path.exists() else "(no log)"
