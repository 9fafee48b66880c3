"""The prepare scripts: what the files hold, and how the scripts behave on the command line."""

import dataclasses
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import encoders, tokenizer
from data.meta import Meta, SplitMeta, check_meta, file_sha256, read_meta, write_meta
from data.openwebtext import prepare as openwebtext
from data.sotu import prepare as sotu
from data.token_file import has_n_tokens, open_tokens
from data.tokenizer import gpt2_encoding

ROOT = Path(__file__).resolve().parents[2]
END_OF_TEXT = 50256


@pytest.fixture(scope="module")
def sotu_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sotu") / "not" / "there"
    sotu.prepare(out)
    return out


def test_sotu_has_the_stated_counts(sotu_dir: Path) -> None:
    assert sorted(path.name for path in sotu_dir.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    for split, n_documents in [("train", 237), ("val", 12)]:
        tokens = open_tokens(sotu_dir / f"{split}.bin", 1)
        assert len(tokens) == sotu.N_TOKENS[split]
        assert np.count_nonzero(tokens == END_OF_TEXT) == n_documents
        assert tokens[-1] == END_OF_TEXT


def test_sotu_is_described_by_its_meta_json(sotu_dir: Path) -> None:
    meta = read_meta(sotu_dir)
    assert meta is not None
    check_meta(meta, sotu_dir, vocab_size=50257)
    assert (meta.train.documents, meta.val.documents) == (237, 12)
    assert meta.train.sha256 == file_sha256(sotu_dir / "train.bin")


def test_sotu_files_decode_to_the_addresses(sotu_dir: Path) -> None:
    for split, texts in sotu.read_addresses().items():
        tokens = open_tokens(sotu_dir / f"{split}.bin", 1)
        assert gpt2_encoding().decode(tokens.tolist()).split("<|endoftext|>") == [*texts, ""]


def test_sotu_validation_is_unseen_in_training() -> None:
    texts = sotu.read_addresses()
    assert len(set(texts["train"]) | set(texts["val"])) == 249
    runs = {split: set().union(*map(_runs_of_20_words, texts[split])) for split in texts}
    # what is left are quotations, most of them in 1868: Andrew Johnson repeats what he said the year before
    assert len(runs["val"] & runs["train"]) / len(runs["val"]) < 0.011


def test_sotu_does_nothing_when_both_files_are_complete_and_repairs_them_when_not(sotu_dir: Path) -> None:
    before = os.stat(sotu_dir / "train.bin")
    run = _script("sotu", "--out", str(sotu_dir))
    assert "there already" in run.stdout
    assert os.stat(sotu_dir / "train.bin").st_ino == before.st_ino

    os.truncate(sotu_dir / "val.bin", 100)
    run = _script("sotu", "--out", str(sotu_dir), python_options=["-X", "importtime"])
    assert "127,418 tokens" in run.stdout
    assert "tiktoken" in _imported(run)
    assert "torch" not in _imported(run)
    assert all(has_n_tokens(sotu_dir / f"{split}.bin", n) for split, n in sotu.N_TOKENS.items())


@pytest.mark.parametrize("corpus", ["sotu", "openwebtext"])
def test_help_imports_neither_torch_nor_datasets(corpus: str) -> None:
    run = _script(corpus, "--help", python_options=["-X", "importtime"])
    assert f"python data/{corpus}/prepare.py" in run.stdout
    assert "argparse" in _imported(run)
    assert not _imported(run) & {"torch", "datasets", "tiktoken", "pyarrow", "huggingface_hub"}


def test_openwebtext_without_a_network_ends_soon_in_one_line_with_alternatives(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    for offline in ("0", "1"):
        start = time.monotonic()
        out = tmp_path / "out"
        run = _script("openwebtext", "--out", str(out), env=environment | {"HF_HUB_OFFLINE": offline}, returncode=2)
        assert time.monotonic() - start < 60
        assert len(run.stderr.splitlines()) == 1, run.stderr
        for alternative in (
            "--input",
            "copy train.bin, val.bin and meta.json",
            "HF_ENDPOINT",
            "HF_HOME",
            "data/sotu/prepare.py",
        ):
            assert alternative in run.stderr
        assert not out.exists()


def test_all_that_may_not_answer_is_given_up_within_a_minute() -> None:
    assert openwebtext.ANSWER_S + 2 * tokenizer._TIMEOUT_S < 60


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openwebtext, "ANSWER_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(ValueError, match=rf"http://127\.0\.0\.1:{port} cannot be reached .*--input"):
            openwebtext._ask(f"http://127.0.0.1:{port}")


def test_an_endpoint_that_is_no_address_is_one_line_with_alternatives() -> None:
    with pytest.raises(ValueError, match=r"(?s)cannot be reached .*--input"):
        openwebtext._ask("hub.local")


def test_an_endpoint_that_is_no_hub_is_one_line_with_alternatives() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            with server.accept()[0] as client:
                client.sendall(b"SSH-2.0-no_hub\r\n")

        greeter = threading.Thread(target=greet)
        greeter.start()
        with pytest.raises(ValueError, match=r"(?s)cannot be reached .*--input"):
            openwebtext._ask(f"http://127.0.0.1:{server.getsockname()[1]}")
        greeter.join()


def _fill_cache(home: Path) -> tuple[Path, dict[str, str]]:
    """The folder of 80 parquet files, of one document each, and the environment in which they are found."""
    repository = "datasets--" + openwebtext.DATASET.replace("/", "--")
    folder = home / "hub" / repository / "snapshots" / openwebtext.REVISION / openwebtext.CONFIG
    folder.mkdir(parents=True)
    for i in range(80):
        pq.write_table(pa.table({"text": [f"file {i}"]}), folder / f"train-{i:05}-of-00080.parquet")
    return folder, os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}


def test_openwebtext_comes_from_the_cache_of_the_hub_in_the_order_of_its_files(tmp_path: Path) -> None:
    folder, environment = _fill_cache(tmp_path)
    out = tmp_path / "out"
    _script("openwebtext", "--out", str(out), "--num-proc", "2", env=environment)
    parts = [gpt2_encoding().decode(open_tokens(out / f"{split}.bin", 1).tolist()) for split in ("val", "train")]
    order = np.random.default_rng(2357).permutation(80)
    assert "".join(parts) == "".join(f"file {i}<|endoftext|>" for i in order)

    (folder / "train-00007-of-00080.parquet").unlink()
    run = _script("openwebtext", "--out", str(tmp_path / "new"), env=environment, returncode=2)
    assert "has 79 of 80 parquet files" in run.stderr
    assert "--input" in run.stderr


def test_of_openwebtext_a_limit_needs_the_first_files_only(tmp_path: Path) -> None:
    folder, environment = _fill_cache(tmp_path)
    for path in sorted(folder.iterdir())[3:]:
        path.unlink()

    def prepare(limit: int, returncode: int = 0) -> str:
        options = ("--out", str(tmp_path / "out"), "--limit", str(limit))
        run = _script("openwebtext", *options, env=environment, returncode=returncode)
        return run.stdout + run.stderr

    assert "val.bin: 1 documents" in prepare(3)
    assert "there already" in prepare(3)
    assert "train.bin: 1 documents" in prepare(2)
    assert "has 3 of 4 parquet files" in prepare(4, returncode=2)


def test_a_limit_downloads_no_file_that_it_does_not_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(*_: object, allow_patterns: list[str], **options: object) -> str:
        asked.append(allow_patterns)
        for pattern in allow_patterns:
            path = tmp_path / pattern
            path.parent.mkdir(exist_ok=True)
            pq.write_table(pa.table({"text": ["text"] * 10}), path)
        return str(tmp_path)

    monkeypatch.setattr(openwebtext, "N_DOCUMENTS", 800)
    monkeypatch.setattr(openwebtext, "_ask", lambda endpoint: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for limit, expected in [(1, [1]), (10, [1]), (11, [1, 2]), (400, [40]), (1000, [80]), (None, [80])]:
        asked.clear()
        names = [Path(path).name for path in openwebtext.openwebtext(2, limit).files]
        assert names == [f"train-{i:05}-of-00080.parquet" for i in range(expected[-1])]
        assert list(map(len, asked)) == expected  # many at once, for they are downloaded beside each other


def test_openwebtext_is_there_where_the_files_have_its_sizes_and_nothing_says_that_they_are_of_another_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask_the_hub(num_proc: int, limit: int | None) -> None:
        raise ValueError("asked the hub")

    def is_there() -> bool:
        code = openwebtext.main()
        output = capsys.readouterr()
        assert ("there already" in output.out) == (code == 0)
        assert ("asked the hub" in output.err) == (code == 2)
        return code == 0

    monkeypatch.setattr(sys, "argv", ["prepare.py", "--out", str(tmp_path)])
    monkeypatch.setattr(openwebtext, "N_TOKENS", {"train": 100, "val": 10})
    monkeypatch.setattr(openwebtext, "openwebtext", ask_the_hub)
    assert not is_there()
    for split, n in openwebtext.N_TOKENS.items():
        (tmp_path / f"{split}.bin").write_bytes(bytes(2 * n))
    assert is_there()
    meta = Meta("gpt2", 50257, "tiktoken 0", "OpenWebText", "f", 0, SplitMeta(3, 100, "a"), SplitMeta(1, 10, "b"))
    write_meta(tmp_path / "meta.json", meta)
    assert is_there()
    write_meta(tmp_path / "meta.json", dataclasses.replace(meta, train=SplitMeta(3, 90, "a")))  # of --limit, earlier
    assert not is_there()
    (tmp_path / "meta.json").unlink()
    (tmp_path / ".prepare" / "job").mkdir(parents=True)  # stopped before its meta.json was moved
    write_meta(tmp_path / ".prepare" / "job" / "meta.json", meta)
    assert not is_there()


@pytest.mark.parametrize(("option", "value"), [("--num-proc", "abc"), ("--limit", "1.5"), ("--limit", "0")])
def test_a_number_that_is_none_is_said_to_be_so(option: str, value: str) -> None:
    run = _script("openwebtext", option, value, returncode=2)
    assert f"argument {option}: '{value}' is no whole number above 0" in run.stderr


def test_without_gigatoken_the_versions_that_are_needed_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(encoders.VERSIONS, "gigatoken", "0.9.0")
    for i in range(2):
        (tmp_path / f"{i}.txt").touch()
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--input", f"{tmp_path}/*.txt", "--out", str(tmp_path / "out")])
    assert openwebtext.main() == 0
    assert f"pip install gigatoken==0.9.0 tiktoken=={encoders.VERSIONS['tiktoken']}" in capsys.readouterr().out


def _imported(run: subprocess.CompletedProcess[str]) -> set[str]:
    """The modules that `python -X importtime` reports."""
    return {line.rsplit("|")[-1].strip() for line in run.stderr.splitlines()}


def _runs_of_20_words(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return set(zip(*(words[i:] for i in range(20)), strict=False))


def _script(
    corpus: str,
    *args: str,
    python_options: list[str] | None = None,
    env: dict[str, str] | None = None,
    returncode: int = 0,
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(python_options or []), str(ROOT / "data" / corpus / "prepare.py"), *args]
    run = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, timeout=100)
    assert run.returncode == returncode, run.stderr
    return run
