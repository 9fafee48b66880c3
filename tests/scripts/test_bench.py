"""scripts/bench.py, run as a user does, on tiny models: what it prints and writes, not how fast it is."""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts import bench
from scripts.benchmarks import prepare
from scripts.lab.options import at_least, file_to_write, whole

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12 on fork beside threads

SCRIPT = Path(bench.__file__)
TINY_GPT = ["--n-layers", "1", "--n-embd", "16", "--vocab-size", "400", "--context-length", "16"]


def run_bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize(
    ("arguments", "arms", "columns"),
    [
        (
            ["optimizer", *TINY_GPT, "--accum-steps", 2],
            {"AdamW fused", "AdamW foreach", "AccumAdamW compiled", "AccumAdamW foreach"},
            ["x AdamW fused", "temporary % of parameters"],
        ),
        (
            ["wrapper", *TINY_GPT, "--small-tensors", 3, "--steps", 1],
            {"GPT, bare", "GPT, in DecentDP", "small tensors, bare", "small tensors, in DecentDP"},
            ["x bare"],
        ),
        (
            ["checkpoint", *TINY_GPT],
            {"copy of the state", "save", "step while it is written", "step"},
            ["x step"],
        ),
        pytest.param(
            ["exchange", "--workers", 2, "--numel", 1000],
            {"all_reduce", "complete", "ring", "exp", "alternating-exp-ring"},
            ["x all_reduce", "% hidden by matmul", "% hidden by sleep"],
            marks=pytest.mark.dist,
        ),
    ],
    ids=["optimizer", "wrapper", "checkpoint", "exchange"],
)
def test_every_arm_is_printed_and_written(
    tmp_path: Path, arguments: list[object], arms: set[str], columns: list[str]
) -> None:
    done = run_bench(*arguments, "--rounds", 2, "--threads", 1, "--json", tmp_path / "results.json")
    assert done.returncode == 0, done.stderr
    written: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())
    assert written["arguments"]["benchmark"] == arguments[0]
    assert written["arguments"]["rounds"] == 2
    lines = {str(row["arm"]): row for row in written["results"]}
    assert arms <= set(lines)  # decent-dp's too, where it is installed
    for arm in arms:
        assert any(line.startswith(arm) and f"{lines[arm]['median ms']}" in line for line in done.stdout.splitlines())
        assert lines[arm]["median ms"] >= lines[arm]["fastest ms"] > 0
    for column in ["median ms", "fastest ms", *columns]:
        assert column in done.stdout
        assert all(column in lines[arm] for arm in arms - {"all_reduce"})


@pytest.mark.dist
def test_loader_prints_the_ratio_and_the_memory(tmp_path: Path) -> None:
    arguments = ["loader", "--tokens", 10_000_000, "--workers", 2, "--steps", 0, "--rounds", 2, "--threads", 1]
    done = run_bench(*arguments, "--json", tmp_path / "results.json")
    assert done.returncode == 0, done.stderr
    lines = {row["arm"]: row for row in json.loads((tmp_path / "results.json").read_text())["results"]}
    for arm in ("nanoGPT get_batch", "memmap", "in_memory"):
        assert lines[arm]["times as fast"] > 0
    assert lines["in_memory, 2 workers"]["held / corpus"] > 0.9
    assert all(f"{value}" in done.stdout for row in lines.values() for value in row.values())


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        *((whole(1), text, f"{text!r} is not a whole number from 1 on") for text in ("0", "-1", "1.5", "many", "")),
        (whole(1, 200), "201", "'201' is not a whole number from 1 to 200"),
        (whole(4, step=4), "17", "'17' is not a multiple of 4 from 4 on"),
        (at_least(0.5), "0", "0 is not a number from 0.5 on"),
        (at_least(0.5), "inf", "inf is not a number from 0.5 on"),
        (at_least(0.5), "nan", "nan is not a number from 0.5 on"),
        (file_to_write, "/nowhere/x.json", "there is no directory /nowhere"),
        (file_to_write, "/", "/ is a directory"),
    ],
)
def test_option_types_quote_an_invalid_value(option: Callable[[str], object], text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{re.escape(message)}$"):
        option(text)


def test_option_types_return_a_valid_value(tmp_path: Path) -> None:
    assert (whole(4, step=4)("1_024"), at_least(0.5)("0.5")) == (1024, 0.5)
    assert file_to_write(f"{tmp_path}/x.json") == tmp_path / "x.json"


@pytest.mark.parametrize("command", list(bench.BENCHMARKS))
def test_invalid_option_is_exit_code_2(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.parse_args([command, "--rounds", "0"])  # not main, which would start to measure
    assert stopped.value.code == 2
    assert "argument --rounds: '0' is not a whole number from 1 on" in capsys.readouterr().err


def test_unwritable_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # permissions do not stop root
    with pytest.raises(argparse.ArgumentTypeError, match=r"x\.json cannot be written"):
        file_to_write(f"{tmp_path}/x.json")


def test_indivisible_batch_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["loader", "--workers", "3"]) == 2
    found = "--workers 3: does not divide the batch of config/quickstart.toml, 32"
    assert capsys.readouterr() == ("", f"bench.py: {found}: take 1, 2, 4, ..., or --steps 0\n")


def test_help_imports_no_torch() -> None:
    program = "import sys; sys.modules['torch'] = None; from scripts import bench; bench.main(['prepare', '--help'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--megabytes" in done.stdout


def test_prepare_compares_three_ways_to_equal_bytes(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"Document {i}: <|endoftext|> don't"}) + "\n" for i in range(50)))
    done = run_bench("prepare", "--input", text, "--rounds", 1, "--json", tmp_path / "results.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    arms = ["nanoGPT", "ours, tiktoken", "ours, gigatoken", "tiktoken's calls", "gigatoken's calls"]
    assert [row["arm"] for row in rows] == arms
    assert len({row["SHA-256 of train.bin, val.bin"] for row in rows[:3]}) == 1
    assert all(row["peak MB"] > 10 for row in rows[:3])


@pytest.mark.parametrize("content", [None, "", '{"text": "one"}\n', '{"text": "one"}\n{"text"\n', '{"body": "one"}\n'])
def test_unusable_text_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    path = tmp_path / "text.jsonl"
    if content is not None:
        path.write_text(content)
    assert bench.main(["prepare", "--input", str(path)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("bench.py: ")
    assert "text.jsonl" in said.err or "document" in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_too_little_text_on_this_machine_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare, "_texts", lambda: iter(["a" * 2_000_000]))
    assert bench.main(["prepare", "--megabytes", "250"]) == 2
    line = "bench.py: --megabytes 250: this machine has 2: ask for less, or give --input\n"
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize(("n_bytes", "n_files"), [(1, 2), (20_000, 8)])
def test_built_text_has_distinct_documents_in_8_files(tmp_path: Path, n_bytes: int, n_files: int) -> None:
    paths = prepare.write_corpus(tmp_path, n_bytes=n_bytes, document_bytes=1400)
    documents = [document for path in paths for document in prepare.read_documents(path)]
    assert len(paths) == n_files
    assert len(set(documents)) == len(documents) >= 2
    assert sum(len(document.encode()) for document in documents) >= n_bytes


def test_prepare_fails_if_the_bytes_differ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a"}\n' * 2)
    outputs = iter(["a b", "a b", "a b", "a b", "a b", "a c"])  # of the measurement of memory, then of time
    monkeypatch.setattr(prepare, "run", lambda *args, **options: (1.0, 1, next(outputs)))
    monkeypatch.setattr(prepare, "calls_s", lambda *args: 1.0)
    with pytest.raises(SystemExit, match="the outputs differ"):
        prepare.measure(argparse.Namespace(input=text, num_proc=2, rounds=1))
