"""scripts/bench.py, run as a user does, on tiny models: what it prints and writes, not how fast it is."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import bench, bench_prepare

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
def test_prints_and_writes_a_line_for_each_arm(
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


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", ""])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        *(("optimizer", f"--{name}") for name in ("rounds", "threads", "n-layers", "n-embd", "vocab-size")),
        *(("optimizer", f"--{name}") for name in ("context-length", "accum-steps")),
        *(("wrapper", f"--{name}") for name in ("small-tensors", "steps")),
        *(("exchange", f"--{name}") for name in ("workers", "numel")),
        *(("loader", f"--{name}") for name in ("workers", "tokens")),
        *(("prepare", f"--{name}") for name in ("num-proc", "document-bytes")),
    ],
)
def test_what_is_no_count_is_exit_code_2(
    capsys: pytest.CaptureFixture[str], command: str, option: str, value: str
) -> None:
    assert f"argument {option}: {value!r} is not a " in mistake_in([command, option, value], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["wrapper", "--n-embd", "17"], "'17' is not a multiple of 4 from 4 on"),
        (["wrapper", "--context-length", "15"], "'15' is not a whole number from 16 on"),
        (["checkpoint", "--vocab-size", "65537"], "'65537' is not a whole number from 1 to 65536"),
        (["exchange", "--workers", "201"], "'201' is not a whole number from 1 to 200"),
        (["loader", "--tokens", "1024"], "'1024' is not a whole number from 1025 on"),
        (["loader", "--steps", "-1"], "'-1' is not a whole number from 0 on"),
        (["prepare", "--megabytes", "0"], "0 is not a number from 0.001 on"),
        (["prepare", "--megabytes", "inf"], "inf is not a number from 0.001 on"),
        (["prepare", "--json", "/nowhere/x.json"], "there is no directory /nowhere"),
        (["prepare", "--json", "/"], "/ is a directory"),
    ],
)
def test_a_mistake_in_the_arguments_is_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in mistake_in(arguments, capsys)


def test_a_file_that_may_not_be_written_is_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # permissions do not stop root
    assert f"{tmp_path}/x.json cannot be written" in mistake_in(["optimizer", "--json", f"{tmp_path}/x.json"], capsys)


def mistake_in(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line that is said before exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        bench.parse_args(arguments)  # not main, which would start to measure
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_workers_that_cannot_share_the_batch_are_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["loader", "--workers", "3"]) == 2
    found = "--workers 3: does not divide the batch of config/quickstart.toml, 32"
    assert capsys.readouterr() == ("", f"bench.py: {found}: take 1, 2, 4, ..., or --steps 0\n")


def test_help_does_not_wait_for_torch() -> None:
    program = (
        f"import runpy, sys; sys.argv = ['bench.py', '--help']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules['torch'] = None; {program}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "optimizer|wrapper|checkpoint|exchange|loader|prepare" in done.stdout


def test_prepare_compares_three_ways_to_the_same_bytes(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"Document {i}: <|endoftext|> don't"}) + "\n" for i in range(50)))
    done = run_bench("prepare", "--input", text, "--rounds", 1, "--json", tmp_path / "results.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    arms = ["nanoGPT", "ours, tiktoken", "ours, gigatoken", "tiktoken's calls", "gigatoken's calls"]
    assert [row["arm"] for row in rows] == arms
    assert len({row["SHA-256 of train.bin, val.bin"] for row in rows[:3]}) == 1
    assert all(row["peak MB"] > 10 for row in rows[:3])


def test_prepare_without_its_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run_bench("prepare", "--input", tmp_path / "none.jsonl")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"bench.py: --input {tmp_path}/none.jsonl: no such file\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.jsonl", "", "train.bin and val.bin need a document each, but it holds 0"),
        ("text.jsonl", '{"text": "one"}\n', "train.bin and val.bin need a document each, but it holds 1"),
        ("text.jsonl", '{"text": "one"}\n{"text"\n', ", line 2: is no JSON"),
        ("text.jsonl", '{"body": "one"}\n', ', line 1: has no key "text"; text is in "body"'),
        ("text.parquet", "text", "is a broken parquet file"),
        ("text.txt", "text", "does not end in .jsonl or .parquet"),
    ],
)
def test_a_text_that_cannot_be_prepared_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert bench.main(["prepare", "--input", str(path)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"bench.py: --input {path}")
    assert message in said.err
    assert "--text-key" not in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_more_text_than_this_machine_has_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_prepare, "_texts", lambda: iter(["a" * 2_000_000]))
    assert bench.main(["prepare", "--megabytes", "250"]) == 2
    line = "bench.py: --megabytes 250: this machine has 2: ask for less, or give --input\n"
    assert capsys.readouterr() == ("", line)


def test_the_text_that_is_built_has_a_document_for_each_split(tmp_path: Path) -> None:
    path = bench_prepare.build_corpus(tmp_path / "text.jsonl", n_bytes=1, document_bytes=1400)
    assert len(path.read_text().splitlines()) == 2


def test_prepare_fails_where_the_bytes_differ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a"}\n' * 2)
    outputs = iter(["a b", "a b", "a b", "a b", "a b", "a c"])  # of the measurement of memory, then of time
    monkeypatch.setattr(bench_prepare, "run", lambda *args, **options: (1.0, 1, next(outputs)))
    with pytest.raises(SystemExit, match="the outputs differ"):
        bench_prepare.bench_prepare(argparse.Namespace(input=text, num_proc=2, rounds=1))
