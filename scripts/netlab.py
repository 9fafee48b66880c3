"""Runs a cluster of several nodes on one machine, to try and to compare the backends at a chosen bandwidth.

Every node is a Linux network namespace with its own address (10.88.0.11, .12, ...). A bridge joins them, and tc limits
each node's link in both directions, as the port of a switch does; workers of one node talk over its loopback, which
has no limit. Needs Linux, root and iproute2. Workers run on the CPU.

    python scripts/netlab.py run --nodes 4 --bandwidth 200mbit -- train.py config/quickstart.toml train.n_steps=100
    python scripts/netlab.py compare --nodes 4 --bandwidth 1gbit,300mbit,100mbit
    python scripts/netlab.py clean      # removes the rest of labs that were killed

Several labs can run at once; but two comparisons would measure each other.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.lab import methods, results
from scripts.lab.network import (
    Lab,
    LabError,
    Launch,
    handled_signals,
    labs_of_dead_owners,
    parse_rates,
    require_root_and_iproute2,
)
from scripts.lab.options import MAX_PROCESSES, at_least, whole

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0; 1 if a worker failed; 124 after a timeout; 130 or 143 if told to stop.

    It is 2 for a mistake in the input, or a machine that has no root or iproute2, after one line.
    """
    args = parse_args(argv)
    try:
        require_root_and_iproute2()
        with handled_signals(_leave, signal.SIGTERM, signal.SIGHUP):
            return args.command(args)
    except (LabError, OSError) as error:
        print(f"netlab.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("netlab.py: stopped", file=sys.stderr)
        return 130


def _leave(number: int, _: object) -> None:
    """Unwind the program as Ctrl-C does, so that it cleans up."""
    raise SystemExit(128 + number)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="run|compare|clean")

    run = commands.add_parser("run", help="torchrun a script on every node")
    _add_cluster(run, "limit of each link: 200mbit, 1gbit, unlimited; one for all nodes, or one for each")
    run.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", type=_assignment, help="set for the script"
    )
    run.add_argument("--log-dir", type=Path, help="also write the output of each node to node<i>.log in this directory")
    run.add_argument("script", nargs=argparse.REMAINDER, help="-- script.py, then its arguments")
    run.set_defaults(command=run_script)

    compare = commands.add_parser(
        "compare",
        help="step times of the backends, side by side",
        description=methods.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_cluster(compare, "one comparison for each of them, all links alike")
    methods.add_arguments(compare)
    compare.set_defaults(command=compare_arms)

    clean = commands.add_parser("clean", help="remove labs whose netlab.py was killed")
    clean.set_defaults(command=remove_abandoned)

    args = parser.parse_args(argv)
    if args.command is run_script:
        args.script = args.script[1:] if args.script[:1] == ["--"] else args.script
        if not args.script:
            run.error("no script: end with -- train.py config/quickstart.toml, say")
        if len(args.bandwidth) not in (1, args.nodes):
            run.error(f"{len(args.bandwidth)} bandwidths for {args.nodes} nodes: give one, or one for each")
    return args


def _add_cluster(parser: argparse.ArgumentParser, bandwidths: str) -> None:
    parser.add_argument("--nodes", type=whole(1, MAX_PROCESSES), default=2, help="network namespaces (%(default)s)")
    parser.add_argument("--procs", type=whole(1, MAX_PROCESSES), default=1, help="workers on each node (%(default)s)")
    parser.add_argument("--bandwidth", type=parse_rates, default="unlimited", metavar="RATE[,RATE...]", help=bandwidths)
    timeout = "seconds, after which the workers are ended (exit code 124)"
    parser.add_argument("--timeout", type=at_least(1), help=timeout)


def _assignment(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def run_script(args: argparse.Namespace) -> int:
    if args.log_dir is not None:
        args.log_dir.mkdir(parents=True, exist_ok=True)
    rates = args.bandwidth * args.nodes if len(args.bandwidth) == 1 else args.bandwidth
    start = time.monotonic()
    with Lab(rates) as lab:
        with Launch(lab, args.procs, args.script, env=dict(args.env), log_dir=args.log_dir) as launch:
            code = launch.wait(args.timeout)
        for node, rate in enumerate(rates):
            sent, received = (f"{n / 1e6:.1f} MB" for n in lab.traffic(node))
            print(f"netlab.py: node {node}, {rate.text}: sent {sent}, received {received}", file=sys.stderr)
    print(f"netlab.py: {time.monotonic() - start:.1f} s", file=sys.stderr)
    return code


def compare_arms(args: argparse.Namespace) -> int:
    """Measure one bandwidth after the other. After each of them JSON and PNG hold the results until then."""
    settings = methods.settings(args)
    report: dict[str, Any] = {**results.describe_machine(), "settings": settings, "scenarios": []}
    with tempfile.TemporaryDirectory(prefix="netlab-") as directory:
        spec, result = Path(directory, "spec.json"), Path(directory, "result.json")
        spec.write_text(json.dumps(settings))
        for rate in args.bandwidth:
            worker = ["-m", "scripts.lab.worker", str(spec), str(result)]
            with Lab([rate] * args.nodes) as lab, Launch(lab, args.procs, worker, cwd=ROOT, out=sys.stderr) as launch:
                code = launch.wait(args.timeout)
            if code != 0:
                return code
            scenario = {"bandwidth": rate.text, "bits_per_s": rate.bits_per_s, **json.loads(result.read_text())}
            if not scenario["arms"]:
                print(f"netlab.py: no arm can run: {'; '.join(results.reasons(scenario))}", file=sys.stderr)
                return 2
            report["scenarios"].append(scenario)
            print(results.table(scenario, settings), flush=True)
            args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            results.draw(report, args.png)
    print(f"wrote {args.json} and {args.png}")
    return 0


def remove_abandoned(_: argparse.Namespace) -> int:
    for lab in labs_of_dead_owners():
        lab.remove()
        print(f"removed lab {lab.id}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
