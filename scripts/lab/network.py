"""The network of netlab.py: namespaces joined by a bridge, limits on their links, torchrun in each of them.

             namespace nl<id>n0              namespace nl<id>sw
            +--------------+   veth   +-------------------------+
            | eth0 .11 tbf |==========| p0 tbf --.              |
            +--------------+          |           br0 (bridge)  |
            | eth0 .12 tbf |==========| p1 tbf --'              |
             namespace nl<id>n1       +-------------------------+
      tbf on eth0: what the node sends      tbf on p0: what it receives

Workers of one node talk over its loopback, which has no limit.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, TextIO

QUEUE_S = 0.1  # length of a link's queue, as time at its rate
GRACE_S = 5  # time in which the other nodes can end by themselves once one has failed
JOIN_TIMEOUT_S = 120  # time in which all nodes must meet


class LabError(RuntimeError):
    """The lab cannot be built here; the message is one line for the user."""


class Rate(NamedTuple):
    text: str  # as the user wrote it
    bits_per_s: float | None  # None means no limit


def parse_rates(text: str) -> list[Rate]:
    """Return the rates that are written as 200mbit, 1.5gbit, 800kbit or unlimited with commas, for argparse."""
    return [Rate(part, None if part == "unlimited" else _bits_per_s(part)) for part in text.split(",")]


def _bits_per_s(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)bit", text.lower())
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a bandwidth such as 200mbit, 1gbit or unlimited")
    return float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[match[2]]


def require_root_and_iproute2() -> None:
    if os.geteuid() != 0:
        raise LabError("needs root, to make network namespaces: run it with sudo, or in a privileged container")
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        raise LabError(f"{' and '.join(missing)} not found: install iproute2 (apt-get install iproute2)")


class Lab:
    """The namespaces, links and limits of one cluster, for as long as its `with` block runs."""

    def __init__(self, rates: list[Rate], lab_id: str | None = None) -> None:
        self.rates = rates  # one for each node
        self.id = lab_id or str(os.getpid())  # unique, and it tells later whether the owner is alive
        self._switch = f"nl{self.id}sw"

    def __enter__(self) -> "Lab":
        self.remove()  # a killed process may have had the same id
        try:
            self._add_namespace(self._switch)
            _tool("ip", "-n", self._switch, "link", "add", "br0", "up", "type", "bridge", "stp_state", "0")
            for node, rate in enumerate(self.rates):
                self._add_node(node, rate)
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def namespace(self, node: int) -> str:
        return f"nl{self.id}n{node}"

    @staticmethod
    def address(node: int) -> str:
        return f"10.88.0.{11 + node}"  # every lab has a bridge of its own, so that all can use the same addresses

    def traffic(self, node: int) -> tuple[int, int]:
        """Return the bytes that the node has sent and received."""
        [link] = json.loads(_tool("ip", "-n", self.namespace(node), "-j", "-s", "link", "show", "eth0"))
        return link["stats64"]["tx"]["bytes"], link["stats64"]["rx"]["bytes"]

    def remove(self) -> None:
        """End the processes in this lab's namespaces and remove these. Links and limits go with them."""
        stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        with handled_signals(signal.SIG_IGN, *stops):  # a second Ctrl-C must not leave half of the lab
            names = [name for lab_id, name in _namespaces() if lab_id == self.id]
            for number in (signal.SIGTERM, signal.SIGKILL):
                for pid in _pids(names):
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)
                end = time.monotonic() + 3
                while time.monotonic() < end and _pids(names):
                    time.sleep(0.05)
            for name in names:
                _tool("ip", "netns", "del", name, check=False)

    def _add_namespace(self, name: str) -> None:
        _tool("ip", "netns", "add", name)
        _tool("ip", "-n", name, "link", "set", "lo", "up")

    def _add_node(self, node: int, rate: Rate) -> None:
        name, port = self.namespace(node), f"p{node}"
        self._add_namespace(name)
        peer = ("peer", "name", "eth0", "netns", name)
        _tool("ip", "-n", self._switch, "link", "add", port, "type", "veth", *peer)
        _tool("ip", "-n", self._switch, "link", "set", port, "master", "br0", "up")
        _tool("ip", "-n", name, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
        _tool("ip", "-n", name, "link", "set", "eth0", "up")
        # A new namespace inherits the host's choice, bbr say. It may pick only what the host allows: reno always is.
        _tool("ip", "netns", "exec", name, "sysctl", "-qw", "net.ipv4.tcp_congestion_control=reno")
        if rate.bits_per_s is not None:
            _limit(name, "eth0", rate.bits_per_s)
            _limit(self._switch, port, rate.bits_per_s)


def _namespaces() -> list[tuple[str, str]]:
    """Return lab id and name of the namespaces of all labs."""
    matches = re.finditer(r"^nl(\d+)(?:sw|n\d+)\b", _tool("ip", "netns", "list"), re.MULTILINE)
    return [(match[1], match[0]) for match in matches]


def _pids(namespaces: list[str]) -> list[int]:
    return [int(pid) for name in namespaces for pid in _tool("ip", "netns", "pids", name, check=False).split()]


def labs_of_dead_owners() -> list[Lab]:
    """Return the labs whose netlab.py was killed before it could remove them."""
    ids = sorted({lab_id for lab_id, _ in _namespaces()})
    return [Lab([], lab_id) for lab_id in ids if not Path("/proc", lab_id).exists()]


def _limit(namespace: str, device: str, bits_per_s: float) -> None:
    # The bucket must hold a packet of TCP, 64 KiB, or tbf cuts each into frames; and the bytes of 1 ms.
    burst = int(max(128 * 1024, bits_per_s / 8 * 0.001))
    limit = int(burst + bits_per_s / 8 * QUEUE_S)
    options = ("rate", f"{int(bits_per_s)}bit", "burst", str(burst), "limit", str(limit))
    _tool("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf", *options)


def _tool(*command: str, check: bool = True) -> str:
    """Return the output of a command, which raises LabError if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise LabError(f"the network cannot be built here: `{' '.join(command)}` said: {reason}")
    return done.stdout


@contextmanager
def handled_signals(handler: Any, *numbers: int) -> Generator[None]:
    """Handle these signals so in the `with` block, and as before after it."""
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


class Launch:
    """torchrun on every node of a lab, for as long as its `with` block runs. The output of the nodes is passed on."""

    def __init__(
        self,
        lab: Lab,
        procs: int,
        script: list[str],
        *,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        out: TextIO = sys.stdout,
        log_dir: Path | None = None,
    ) -> None:
        self._lab, self._script, self._cwd, self._out, self._log_dir = lab, script, cwd, out, log_dir
        self._command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(lab.rates)}"]
        self._command += [f"--nproc_per_node={procs}", "--max-restarts=0", f"--rdzv-id=netlab{lab.id}"]
        self._command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={lab.address(0)}:29400"]
        self._env = {
            **os.environ,
            "GLOO_SOCKET_IFNAME": "eth0",
            "TP_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",  # all nodes share the cores
            "CUDA_VISIBLE_DEVICES": "",  # NCCL refuses two nodes on one GPU
            "PYTHONUNBUFFERED": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # it warns that addresses here have no names
            **(env or {}),
        }
        self._running: list[tuple[subprocess.Popen[str], threading.Thread]] = []  # with the reader of its output

    def __enter__(self) -> "Launch":
        for node in range(len(self._lab.rates)):
            # All namespaces have the same host name, so torchrun cannot see which of them hosts the store.
            host = f"--rdzv-conf=is_host={int(node == 0)},join_timeout={JOIN_TIMEOUT_S}"
            inside = ["ip", "netns", "exec", self._lab.namespace(node), *self._command, host]
            process = subprocess.Popen(
                [*inside, f"--local-addr={self._lab.address(node)}", *self._script],
                env=self._env,
                cwd=self._cwd,
                text=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the lab, which ends the workers
            )
            reader = threading.Thread(target=self._say, args=(node, process.stdout), daemon=True)
            reader.start()
            self._running.append((process, reader))
        return self

    def __exit__(self, *exception: object) -> None:
        for process, _ in self._running:
            process.terminate()
        for _, reader in self._running:
            reader.join(timeout=GRACE_S)

    def wait(self, timeout_s: float | None) -> int:
        """Return 0, 1 if a node failed, or 124 after a timeout. After a failure the other nodes would wait for ever."""
        deadline = time.monotonic() + (timeout_s or float("inf"))
        end = float("inf")  # of the grace after a failure
        while None in (codes := [process.poll() for process, _ in self._running]) and time.monotonic() < end:
            time.sleep(0.1)
            if any(codes):
                end = min(end, time.monotonic() + GRACE_S)
            if time.monotonic() > deadline:
                print(f"netlab.py: ended after {timeout_s:g} s", file=sys.stderr)
                return 124
        return int(any(codes))

    def _say(self, node: int, lines: IO[str]) -> None:
        path = self._log_dir / f"node{node}.log" if self._log_dir else os.devnull
        with open(path, "w", encoding="utf-8", buffering=1) as log:  # written line by line
            for line in lines:
                log.write(line)
                self._out.write(line if node == 0 else f"[node {node}] {line}")
                self._out.flush()
