"""data/meta.py: what meta.json says, and how train.py holds it against the configuration and the files."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.meta import Meta, SplitMeta, check_meta, file_sha256, read_meta, sync_and_hash, write_meta

ROOT = Path(__file__).resolve().parents[2]
META = Meta("gpt2", 50257, "tiktoken 0", "texts/*.txt", "f", 0, SplitMeta(3, 1000, "a"), SplitMeta(1, 100, "b"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.bin").write_bytes(b"\1\0" * 1000)
    (tmp_path / "val.bin").write_bytes(b"\1\0" * 100)
    write_meta(tmp_path / "meta.json", META)
    return tmp_path


def test_reading_undoes_writing(folder: Path) -> None:
    assert read_meta(folder) == META
    assert read_meta(folder / "elsewhere") is None


def test_hashes_are_those_of_the_files(folder: Path) -> None:
    assert sync_and_hash(folder) == {split: file_sha256(folder / f"{split}.bin") for split in ("train", "val")}
    # printf '\1\0%.0s' $(seq 100) | sha256sum
    assert file_sha256(folder / "val.bin") == "1115e762552ae9c13837cbf6949cab2dd2f8e9de9ea226c50236f9c888a5f25e"


def test_a_vocabulary_that_is_too_small_and_files_of_another_size_are_found(folder: Path) -> None:
    check_meta(META, folder, vocab_size=50257)
    with pytest.raises(ValueError, match=r"model\.vocab_size = 50256 is below the 50257 tokens of gpt2"):
        check_meta(META, folder, vocab_size=50256)
    os.truncate(folder / "val.bin", 198)
    with pytest.raises(ValueError, match=r"val\.bin: holds 99 tokens, but .*meta\.json says 100"):
        check_meta(META, folder, vocab_size=50257)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"train": 1, "val": 2}', "[" * 100_000),
        json.dumps(dataclasses.asdict(META))[:-9],
        json.dumps(dataclasses.asdict(dataclasses.replace(META, vocab_size="50257"))),
        json.dumps(dataclasses.asdict(dataclasses.replace(META, source=None))),
        json.dumps(dataclasses.asdict(dataclasses.replace(META, train=dataclasses.replace(META.train, tokens=1e3)))),
    ],
    ids=range(9),
)
def test_what_is_no_description_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(ValueError, match=r"meta\.json: is no description of a corpus"):
        read_meta(tmp_path)


def test_own_texts_become_a_data_folder_that_train_py_takes(tmp_path: Path) -> None:
    """As a user does it, in a copy of the repository: data/mine has no prepare.py."""
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "data").mkdir()
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("Hello world. " * 500)
    script = ROOT / "data" / "openwebtext" / "prepare.py"
    subprocess.run([sys.executable, script, "--input", "*.txt", "--out", "data/mine"], cwd=tmp_path, check=True)
    overrides = [
        *("dataset=mine", "log.wandb_log=false", "log.run_name=run", "log.eval_steps=1", "train.n_steps=1"),
        *("train.lr_schedule.warmup_steps=0", "train.compile=false", "train.amp=false", "in_memory=false"),
        *("train.global_batch_size=2", "train.context_length=8", "model.n_layers=1", "model.n_embd=8"),
        *("model.n_heads=1", 'train.backend="pytorchddp"'),
    ]

    def train(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "train.py", str(ROOT / "config" / "quickstart.toml"), *overrides, *more]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)

    refused = train("model.vocab_size=50000")
    assert refused.returncode == 2
    assert "model.vocab_size = 50000 is below the 50257 tokens of gpt2" in refused.stderr + refused.stdout
    assert not (tmp_path / "log").exists()
    done = train("model.vocab_size=50304")
    assert done.returncode == 0, done.stderr
    assert (
        "corpus: *.txt, 3,004 tokens (gpt2) in 2 documents to train on" in (tmp_path / "log/run/train.log").read_text()
    )
