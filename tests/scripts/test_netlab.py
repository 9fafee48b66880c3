"""scripts/netlab.py: its pure parts, what it says to mistakes, and one real lab."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import matplotlib.image
import pytest

from config import TopologyName
from decent import World
from scripts import netlab
from scripts.lab import methods, network, results, worker

SCRIPT = Path(netlab.__file__)
TINY = ("--n-layers", "2", "--n-embd", "64", "--compute-ms", "6", "--rounds", "1", "--steps", "2")
TINY_BYTES = 4 * (2048 * 64 + 2 * (12 * 64 * 64 + 2 * 64))  # float32: embedding, two blocks


def obstacle() -> str:
    """Return the reason why no lab can be built here."""
    try:
        network.require_root_and_iproute2()
    except network.LabError as error:
        return str(error)
    unshare = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, check=False)
    return unshare.stderr


needs_lab = pytest.mark.skipif(obstacle() != "", reason=f"no lab: {obstacle()}")


def run_netlab(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100, check=False)


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines()}


@pytest.mark.parametrize(
    ("text", "bits_per_s"),
    [("200mbit", 200e6), ("1gbit", 1e9), ("1.5Gbit", 1.5e9), ("64kbit", 64e3), ("8000bit", 8e3), ("unlimited", None)],
)
def test_rate_is_read_in_bits_per_second(text: str, bits_per_s: float | None) -> None:
    assert network.parse_rates(f"{text},1mbit") == [(text, bits_per_s), ("1mbit", 1e6)]


def test_method_is_read_from_its_name() -> None:
    arm = methods.parse_method("alternating-exp-ring_bf16_every8_adamw")
    assert (arm.family, arm.topology, arm.optimizer) == ("decentdp", "alternating-exp-ring", "adamw")
    assert (arm.bf16, arm.every) == (True, 8)
    assert methods.parse_method("decent-dp_exp") == methods.Method("decent-dp_exp", "decent-dp", "accumadamw", "exp")
    assert methods.parse_method("localsgd8").every == 8


def test_every_listed_method_can_be_read() -> None:
    assert [arm.name for arm in methods.parse_methods("all")] == list(methods.ALL_ARMS)
    assert set(methods.DEFAULT_ARMS) <= set(methods.ALL_ARMS)
    assert [arm.name for arm in methods.parse_methods("exp,none,exp")] == ["exp", "none"]


@pytest.mark.parametrize("which", ["default", "all"])
def test_arms_hold_each_topology_in_each_dtype(which: str) -> None:
    arms = methods.parse_methods(which)
    sent = {(arm.topology, arm.bf16) for arm in arms if arm.family == "decentdp" and arm.every == 1}
    assert sent == {(t, bf16) for t in get_args(TopologyName) for bf16 in (False, True)} - {("complete", True)}


def test_hidden_share_is_the_part_without_waiting() -> None:
    assert results.hidden_share(400, 300, 400) == pytest.approx(0.75)
    assert results.hidden_share(290, 300, 400) == 1  # a fast block, not more than all
    assert results.hidden_share(900, 300, 400) == 0
    assert results.hidden_share(400, None, 400) is None
    assert results.hidden_share(300, 300, None) is None


def measured(name: str, ms: list[float], exchange_ms: float | None = None, sent: float = 0) -> dict[str, Any]:
    """Raw numbers of two workers on two nodes, the second 20 ms slower; one block for each of `ms`."""
    block = {"exchange_ms": [exchange_ms, exchange_ms], "sent_bytes": [sent, sent + 2e6]}
    return {"name": name, "blocks": [{"ms": [x - 10, x + 10], **block} for x in ms]}


@pytest.fixture
def scenario() -> dict[str, Any]:
    arms = [
        measured("none", [300, 310, 290]),
        measured("pytorchddp", [1200, 1000, 1100], 700, 40e6),
        measured("pytorchddp_4mb", [900, 990, 880], 700, 40e6),
        measured("exp_bf16", [450, 440, 480], 600, 19e6),
    ]
    skipped = [{"name": "complete_bf16", "skipped": "cannot send bfloat16"}]
    return {"bandwidth": "300mbit", "parameters": 10_500_000, "arms": arms, "skipped": skipped}


@pytest.fixture
def settings() -> dict[str, Any]:
    return methods.settings(netlab.parse_args(["compare", "--nodes", "4"]))


def test_faster_ddp_is_the_reference(scenario: dict[str, Any]) -> None:
    by_arm = {result.arm: result for result in results.summarize(scenario["arms"])}
    assert by_arm["exp_bf16"] == results.Result(
        "exp_bf16", step_ms=450, best_ms=440, exchange_ms=600, speedup=2.0, hidden=0.75, sent_bytes=20e6
    )
    assert by_arm["pytorchddp_4mb"].speedup == 1.0
    assert by_arm["pytorchddp"].speedup == pytest.approx(900 / 1100)
    assert by_arm["none"].hidden is None
    (alone,) = results.summarize(scenario["arms"][-1:])
    assert (alone.speedup, alone.hidden) == (None, None)


def test_table_holds_numbers_and_skipped_arms(scenario: dict[str, Any], settings: dict[str, Any]) -> None:
    lines = results.table(scenario, settings).splitlines()
    assert lines[1] == "300mbit: 4 nodes x 1, 10.5M parameters (42.0 MB), computation 345 ms (emulated)"
    row = next(line for line in lines if "exp_bf16" in line)
    assert [cell.strip() for cell in row.split("|")] == ["", "exp_bf16", "450 (440)", "2.00", "600", "75%", "20.0", ""]
    assert len({len(line) for line in lines if line.startswith("|")}) == 1
    assert lines[-1] == "complete_bf16: cannot send bfloat16"


def test_table_of_stragglers_has_no_hidden_share(scenario: dict[str, Any], settings: dict[str, Any]) -> None:
    table = results.table(scenario, {**settings, "straggler": 2})
    assert "one random worker 2x slower each step" in table
    assert "%" not in table


def test_image_has_a_panel_for_each_bandwidth(
    tmp_path: Path, scenario: dict[str, Any], settings: dict[str, Any]
) -> None:
    report = {**results.describe_machine(), "settings": settings, "scenarios": [scenario]}
    widths = []
    for _ in range(2):
        results.draw(report, tmp_path / "x.png")
        image = matplotlib.image.imread(tmp_path / "x.png")
        assert image.std() > 0.05  # it is not empty
        widths.append(image.shape[1])
        report["scenarios"].append(scenario)
    assert widths[1] > 1.5 * widths[0]


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from scripts import netlab\ntry: netlab.main(['--help'])\nfinally: print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "compare" in shown.stdout
    assert not {"torch", "matplotlib"} & set(shown.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--nodes", "3", "--bandwidth", "1gbit,1gbit", "--", "x.py"], "2 bandwidths for 3 nodes"),
        (["run", "--nodes", "2"], "no script"),
        (["run", "--env", "x", "--", "x.py"], "'x' is not NAME=VALUE"),
        (["compare", "--nodes", "0"], "'0' is not a whole number from 1 to 200"),
        (["compare", "--arms", "exp_fp8"], "no arm is called 'exp_fp8'; there are none,"),
        (["compare", "--straggler", "0.5"], "0.5 is not a number from 1 on"),
        (["compare", "--png", "/nowhere/x.png"], "there is no directory /nowhere"),
        (["compare", "--png", "x.xyz"], "x.xyz does not end in .png"),
        (["compare", "--timeout", "0"], "0 is not a number from 1 on"),
        *(
            (["compare", f"--bandwidth={text}"], "is not a bandwidth")
            for text in ("", "200", "0mbit", "1mbit,", "25MB")
        ),
    ],
)
def test_invalid_option_is_exit_code_2(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        netlab.parse_args(arguments)  # not main, which would start to measure
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("user_id", "missing_tool", "message"),
    [
        (65534, None, "needs root, to make network namespaces: run it with sudo, or in a privileged container"),
        (0, "tc", "tc not found: install iproute2 (apt-get install iproute2)"),
    ],
)
def test_missing_root_or_iproute2_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    user_id: int,
    missing_tool: str | None,
    message: str,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user_id)
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == missing_tool else tool)
    assert netlab.main(["clean"]) == 2
    assert capsys.readouterr().err == f"netlab.py: {message}\n"


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No namespace of a lab that has ended. Labs that run beside this test are not its own."""
    before = {lab.id for lab in network.labs_of_dead_owners()}
    yield
    assert {lab.id for lab in network.labs_of_dead_owners()} <= before


@needs_lab
@pytest.mark.dist
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("procs", "shares"),  # what a node sends in a step, of the S bytes of the parameters in float32
    [
        # An all-reduce of S bytes over two nodes, and the exchange of a pair: S from each, half of it in bfloat16.
        (1, {"none": 0, "pytorchddp": 1, "exp_adamw": 1, "exp_bf16_adamw": 1 / 2}),
        # S from each node in every second step, by its workers together; in the other one nothing.
        (2, {"alternating-exp-ring_adamw": 1 / 2}),
    ],
)
def test_links_carry_the_bytes_of_the_algorithms(tmp_path: Path, procs: int, shares: dict[str, float]) -> None:
    arms = ",".join([*shares, "complete_bf16"])  # the last one cannot run
    cluster = ("--nodes", 2, "--procs", procs, "--bandwidth", "200mbit")
    result = run_netlab("compare", *cluster, "--arms", arms, "--json", "c.json", *TINY, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [line.split("|")[1].strip() for line in result.stdout.splitlines() if line.startswith("|")][2:]
    assert rows == list(shares)
    assert 'complete_bf16: topology "complete" cannot send' in result.stdout
    assert result.stdout.splitlines()[-1] == "wrote c.json and netlab.png"
    assert {path.name for path in tmp_path.iterdir()} == {"c.json", "netlab.png"}
    (scenario,) = json.loads((tmp_path / "c.json").read_text())["scenarios"]
    for arm in results.summarize(scenario["arms"]):
        # Headers and barriers come on top, and alone they are less than 1% of S.
        expected = pytest.approx(shares[arm.arm] * TINY_BYTES, rel=0.1, abs=0.01 * TINY_BYTES)
        assert arm.sent_bytes == expected, arm.arm


def launch_without_arms(_lab: network.Lab, _procs: int, command: list[str], **_: object) -> Any:
    """Stand in for network.Launch, where no arm can run."""
    skipped = [{"name": "complete_bf16", "skipped": "cannot send"}]
    Path(command[-1]).write_text(json.dumps({"parameters": 1, "arms": [], "skipped": skipped}))
    return nullcontext(SimpleNamespace(wait=lambda _: 0))


def test_missing_decent_dp_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "decent_dp", None)
    settings = {"n_embd": 8, "n_layers": 1, "compute_ms": 1}
    with pytest.raises(ValueError, match="decent-dp is not installed: pip install"):
        worker.build(methods.parse_method("decent-dp_exp"), settings, [], World.from_env())


@needs_lab
def test_no_possible_arm_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(netlab, "Launch", launch_without_arms)
    monkeypatch.chdir(tmp_path)
    assert netlab.main(["compare", "--arms", "complete_bf16"]) == 2
    assert capsys.readouterr() == ("", "netlab.py: no arm can run: complete_bf16: cannot send\n")
    assert not list(tmp_path.iterdir())


@needs_lab
@pytest.mark.fault
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_lab_leaves_nothing(tmp_path: Path, number: signal.Signals, code: int) -> None:
    script = tmp_path / "wait.py"
    script.write_text("import os, time\nprint('pid', os.getpid(), flush=True)\ntime.sleep(1000)\n")
    command = [sys.executable, str(SCRIPT), "run", "--nodes", "1", "--", str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as lab:
        assert lab.stdout is not None
        worker = next(int(line.split()[-1]) for line in lab.stdout if "pid" in line)
        assert f"nl{lab.pid}n0" in namespaces()
        lab.send_signal(number)
        assert lab.wait(timeout=30) == code
    assert not {name for name in namespaces() if name.startswith(f"nl{lab.pid}")}
    assert not Path("/proc", str(worker)).exists()


@needs_lab
@pytest.mark.fault
@pytest.mark.usefixtures("nothing_left")
def test_failed_script_ends_the_lab_and_shows_its_output(tmp_path: Path) -> None:
    script = tmp_path / "fail.py"
    script.write_text(
        "import os, time\nif os.environ['RANK'] == '1':\n    raise RuntimeError('no luck')\ntime.sleep(999)\n"
    )
    result = run_netlab("run", "--nodes", 2, "--log-dir", tmp_path, "--", script)
    assert result.returncode == 1
    assert "no luck" in result.stdout
    assert "netlab.py: node 1, unlimited: sent 0." in result.stderr
    assert "no luck" in (tmp_path / "node1.log").read_text() + (tmp_path / "node0.log").read_text()


@needs_lab
@pytest.mark.fault
@pytest.mark.usefixtures("nothing_left")
def test_clean_removes_only_labs_of_dead_owners() -> None:
    with subprocess.Popen(["true"]) as gone:
        pass
    [rate] = network.parse_rates("1gbit")
    with network.Lab([rate]) as alive:
        dead = network.Lab([rate], lab_id=str(gone.pid)).__enter__()
        assert f"removed lab {dead.id}\n" in run_netlab("clean").stdout
        assert alive.namespace(0) in namespaces()
        assert dead.namespace(0) not in namespaces()


def test_two_rounds_have_the_same_stragglers_a_step_apart() -> None:
    def draws(round_: int) -> list[int]:
        steps = [[worker.slowness_of(rank, 4, round_, 2.0, step) for rank in range(4)] for step in range(96)]
        assert all(sorted(step) == [1, 1, 1, 2] for step in steps)
        return [step.index(2) for step in steps]

    first, second, third = (draws(round_) for round_ in range(3))
    assert first[1:] == second[:-1]
    assert first != third
    assert set(first) == {0, 1, 2, 3}
