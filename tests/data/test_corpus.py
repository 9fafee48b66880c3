"""data/corpus.py: a file is whole or absent, a bad one is refused in words that help, and meta.json describes both."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.corpus import (
    Meta,
    SplitMeta,
    file_sha256,
    has_n_tokens,
    new_file,
    open_tokens,
    read_meta,
    sync_and_hash,
    write_meta,
)
from tests.launcher import Launcher

ROOT = Path(__file__).resolve().parents[2]

META = Meta(
    tokenizer="gpt2",
    vocab_size=50257,
    encoded_by="tiktoken 0",
    source="texts/*.txt",
    source_fingerprint="f",
    documents_left_out=0,
    train=SplitMeta(documents=3, tokens=1000, sha256="a"),
    val=SplitMeta(documents=1, tokens=100, sha256="b"),
    val_fraction=None,
)
FIELDS = META.model_dump()


def test_tokens_are_little_endian_and_read_only(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    path.write_bytes(b"\1\0\0\1\xff\xff")
    tokens = open_tokens(path, 3)
    assert tokens.tolist() == [1, 256, 65535]
    assert type(tokens) is np.ndarray
    assert not tokens.flags.writeable
    assert has_n_tokens(path, 3)
    assert not has_n_tokens(path, 2)
    assert not has_n_tokens(tmp_path / "val.bin", 0)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_writer_leaves_the_older_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "train.bin"
    path.write_bytes(b"older")

    def write_and_raise() -> None:
        with new_file(path) as file:
            file.write(b"newer")
            raise error

    with pytest.raises(error):
        write_and_raise()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"older"]
    with new_file(path) as file:
        file.write(b"newer")
        assert path.read_bytes() == b"older"
    (tmp_path / "plain").touch()
    assert path.read_bytes() == b"newer"
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty or cut inside a 2-byte token; remove it and make it with"),
        (b"\0" * 7, "is empty or cut inside a 2-byte token"),
        (b"\0" * 8, "holds 4 tokens, but one window of train.context_length = 4 takes 5; set .* to at most 3, or"),
        (b"\0" * 2, "holds 1 tokens, but one window of train.context_length = 4 takes 5; use a larger corpus"),
    ],
)
def test_a_bad_file_is_refused_in_words_that_help(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "val.bin").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/val.bin: {message}"):
        open_tokens(tmp_path / "val.bin", 5)


@pytest.mark.parametrize(
    ("path", "scripts"),
    [
        (ROOT / "data/sotu/absent.bin", "`python data/sotu/prepare.py`"),
        ("/absent/sotu/train.bin", "`python data/sotu/prepare.py --out /absent/sotu`"),
        (
            "/absent/train.bin",
            "`python data/.*/prepare.py --out /absent` or .*`python data/sotu/prepare.py --out /absent`",
        ),
    ],
)
def test_a_missing_file_names_the_script_that_makes_it(path: str | Path, scripts: str) -> None:
    with pytest.raises(ValueError, match=f"^{path}: no such file; make it with {scripts}$"):
        open_tokens(path, 5)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{tmp_path}: cannot be read: Is a directory"):
        open_tokens(tmp_path, 5)
    (tmp_path / "train.bin").touch(mode=0)
    # root may read anything: become nobody first
    program = (
        "import os, sys; from data.corpus import open_tokens; os.geteuid() or os.setuid(65534)\n"
        "try: open_tokens(sys.argv[1], 1)\n"
        "except ValueError as error: print(error)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "train.bin")]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout == f"{tmp_path}/train.bin: cannot be read: Permission denied\n"


@pytest.mark.dist
def test_own_texts_become_a_folder_that_train_py_takes(launcher: Launcher, tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"Text {i} of my own. " * 40)
    command = [sys.executable, "data/openwebtext/prepare.py", "--input", tmp_path / "*.txt", "--out", tmp_path / "mine"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    run = launcher.run(f"data_dir={tmp_path / 'mine'}", "model.vocab_size=50257", "train.n_steps=3")
    assert run.codes == [0], run.errors
    assert any("documents to train on" in line and "(gpt2) in 18 " in line for line in run.log)


def test_reading_undoes_writing(tmp_path: Path) -> None:
    write_meta(tmp_path, META)
    assert read_meta(tmp_path) == META
    assert read_meta(tmp_path / "elsewhere") is None


def test_a_source_may_have_names_that_are_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(json.dumps(FIELDS | {"source": "\udcff*.txt"}))
    meta = read_meta(tmp_path)
    assert meta is not None
    assert meta.source == "?*.txt"


def test_hashes_are_sha256_of_the_files(tmp_path: Path) -> None:
    for split, n in (("train", 1000), ("val", 100)):
        (tmp_path / f"{split}.bin").write_bytes(b"\1\0" * n)
    # printf '\1\0%.0s' $(seq 100) | sha256sum
    val = "1115e762552ae9c13837cbf6949cab2dd2f8e9de9ea226c50236f9c888a5f25e"
    assert sync_and_hash(tmp_path) == {"train": file_sha256(tmp_path / "train.bin"), "val": val}


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"train": 1, "val": 2}', "[" * 100_000),
        json.dumps(FIELDS)[:-9],
        json.dumps(FIELDS | {"vocab_size": "50257"}),
        json.dumps(FIELDS | {"source": None}),
        json.dumps(FIELDS | {"train": FIELDS["train"] | {"tokens": 1e3}}),
    ],
    ids=range(9),
)
def test_an_invalid_description_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(ValueError, match=r"meta\.json: does not describe a corpus"):
        read_meta(tmp_path)
