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

TINY_GPT = ["--n-layers", "1", "--n-embd", "16", "--vocab-size", "400", "--context-length", "16"]


def run_bench(tmp_path: Path, *arguments: object) -> tuple[str, dict[str, Any]]:
    """Return what a successful run printed and wrote."""
    command = [sys.executable, bench.__file__, *map(str, arguments), "--threads", "1", "--json", tmp_path / "out.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((tmp_path / "out.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "arms", "columns"),
    [
        (
            ["optimizer", *TINY_GPT, "--accum-steps", 2],
            {"AdamW fused", "AdamW foreach", "AccumAdamW compiled", "AccumAdamW eager"},
            ["x AdamW fused", "temporary % of parameters"],
        ),
        (
            ["wrapper", *TINY_GPT, "--small-tensors", 3],
            {"GPT, bare", "GPT, in DecentDP", "small tensors, bare", "small tensors, in DecentDP"},
            ["x bare"],
        ),
        (
            ["checkpoint", *TINY_GPT, "--vocab-size", 200],  # too small to be compiled, which takes seconds
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
    printed, written = run_bench(tmp_path, *arguments, "--rounds", 2)
    assert (written["arguments"]["benchmark"], written["arguments"]["rounds"]) == (arguments[0], 2)
    lines = {str(row["arm"]): row for row in written["results"]}
    assert arms <= set(lines)  # decent-dp's too, where it is installed
    for arm in arms:
        assert any(line.startswith(arm) and f"{lines[arm]['median ms']}" in line for line in printed.splitlines())
        assert lines[arm]["median ms"] >= lines[arm]["fastest ms"] > 0
    for column in ["median ms", "fastest ms", *columns]:
        assert column in printed
        assert all(column in lines[arm] for arm in arms - {"all_reduce"})


@pytest.mark.dist
def test_loader_prints_the_ratio_and_the_memory(tmp_path: Path) -> None:
    _, written = run_bench(tmp_path, "loader", "--tokens", 10_000_000, "--workers", 2, "--steps", 0, "--rounds", 2)
    lines = {row["arm"]: row for row in written["results"]}
    assert all(lines[arm]["times as fast"] > 0 for arm in ("nanoGPT get_batch", "memmap", "in_memory"))
    assert lines["in_memory, 2 workers"]["held / corpus"] > 0.9


def test_prepare_compares_three_ways_to_equal_bytes(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"Document {i}: <|endoftext|> don't"}) + "\n" for i in range(50)))
    _, written = run_bench(tmp_path, "prepare", "--input", text, "--rounds", 1)
    rows = written["results"]
    assert [row["arm"] for row in rows] == ["nanoGPT", "ours, tiktoken", "ours, gigatoken"]
    assert len({row["SHA-256 of train.bin, val.bin"] for row in rows}) == 1
    assert all(row["peak MB"] > 10 for row in rows)


def test_prepare_fails_if_the_bytes_differ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a"}\n' * 2)
    outputs = iter(["a b", "a b", "a b", "a b", "a b", "a c"])  # of the measurement of memory, then of time
    monkeypatch.setattr(prepare, "run", lambda *args, **options: (1.0, 1, next(outputs)))
    with pytest.raises(SystemExit, match="the outputs differ"):
        prepare.measure(argparse.Namespace(input=text, num_proc=2, rounds=1))


@pytest.mark.parametrize("content", [None, '{"text": "one"}\n', '{"text": "one"}\n{"text"\n'])
def test_unusable_text_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    path = tmp_path / "text.jsonl"
    if content is not None:
        path.write_text(content)
    assert bench.main(["prepare", "--input", str(path)]) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(r"bench\.py: .*(text\.jsonl|document).*\n", err)
    assert out == ""


@pytest.mark.parametrize(("n_bytes", "n_files"), [(1, 2), (20_000, 8)])
def test_built_text_has_distinct_documents_in_8_files(tmp_path: Path, n_bytes: int, n_files: int) -> None:
    paths = prepare.write_corpus(tmp_path, n_bytes=n_bytes, document_bytes=1400)
    documents = [json.loads(line)["text"] for path in paths for line in Path(path).read_text().splitlines()]
    assert len(paths) == n_files
    assert len(set(documents)) == len(documents) >= 2
    assert sum(len(document.encode()) for document in documents) >= n_bytes


def test_impossible_sizes_are_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare, "_texts", lambda: iter(["a" * 2_000_000]))
    assert bench.main(["prepare", "--megabytes", "250"]) == bench.main(["loader", "--workers", "3"]) == 2
    text = "bench.py: --megabytes 250: this machine has 2: ask for less, or give --input\n"
    batch = "bench.py: --workers 3: does not divide the batch of config/quickstart.toml, 32: take 1, 2, 4, ..., or "
    assert capsys.readouterr() == ("", f"{text}{batch}--steps 0\n")


def test_help_imports_no_torch() -> None:
    program = "import sys; sys.modules['torch'] = None; from scripts import bench; bench.main(['prepare', '--help'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--megabytes" in done.stdout


def test_each_command_has_its_own_number_of_rounds() -> None:
    rounds = {name: bench.parse_args([name]).rounds for name in ("optimizer", "wrapper", "exchange", "prepare")}
    assert rounds == {"optimizer": 20, "wrapper": 50, "exchange": 20, "prepare": 3}


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
        (file_to_write, "/tmp/x.json", "/tmp/x.json cannot be written"),
    ],
)
def test_option_types_quote_an_invalid_value(
    monkeypatch: pytest.MonkeyPatch, option: Callable[[str], object], text: str, message: str
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # permissions do not stop root
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{re.escape(message)}$"):
        option(text)


def test_option_types_return_a_valid_value(tmp_path: Path) -> None:
    assert (whole(4, step=4)("1_024"), at_least(0.5)("0.5")) == (1024, 0.5)
    assert file_to_write(f"{tmp_path}/x.json") == tmp_path / "x.json"
