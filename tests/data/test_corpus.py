"""data/corpus.py: a file is whole or absent, a bad one is refused in words that help, and meta.json describes both."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.corpus import (
    Meta,
    SplitMeta,
    Tokens,
    check_meta,
    file_sha256,
    has_n_tokens,
    open_tokens,
    read_meta,
    sync_and_hash,
    write_meta,
    write_tokens,
)

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
# written by an older version, before val_fraction, for a source whose name is not UTF-8
OLDER = """{"tokenizer": "gpt2", "vocab_size": 50257, "encoded_by": "gigatoken 0.10.0", "source": "\\udcff*.txt",
"source_fingerprint": "f, first 7", "documents_left_out": 2, "train": {"documents": 6, "tokens": 20, "sha256": "a"},
"val": {"documents": 1, "tokens": 3, "sha256": "b"}, "left_out": "2 documents could not be read"}"""

documents = st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=5).map(lambda ids: np.array(ids, dtype=np.int64)))


@given(documents)
def test_a_file_is_its_documents_in_little_endian_16_bits(
    tmp_path_factory: pytest.TempPathFactory, documents: list[np.ndarray]
) -> None:
    path = tmp_path_factory.mktemp("tokens") / "train.bin"
    n_tokens = write_tokens(path, documents)
    expected = [int(token) for document in documents for token in document]
    assert n_tokens == len(expected)
    assert path.read_bytes() == b"".join(token.to_bytes(2, "little") for token in expected)
    assert has_n_tokens(path, n_tokens)
    if expected:
        assert open_tokens(path, 1).tolist() == expected


def test_tokens_are_a_read_only_plain_array(tmp_path: Path) -> None:
    write_tokens(tmp_path / "train.bin", [np.arange(5)])
    tokens = open_tokens(tmp_path / "train.bin", 5)
    assert type(tokens) is np.ndarray
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_writer_leaves_the_older_file_alone(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "train.bin"

    def breaks() -> Iterator[Tokens]:
        yield np.arange(100_000, dtype=np.uint16)
        assert [p.name for p in tmp_path.iterdir() if p != path]  # it is being written, under another name
        raise error

    with pytest.raises(error):
        write_tokens(path, breaks())
    assert list(tmp_path.iterdir()) == []

    write_tokens(path, [np.array([1, 2, 3])])
    with pytest.raises(error):
        write_tokens(path, breaks())
    assert list(tmp_path.iterdir()) == [path]
    assert open_tokens(path, 1).tolist() == [1, 2, 3]


@pytest.mark.parametrize("token", [-1, 2**16, 2**40])
def test_a_token_above_16_bits_is_refused(tmp_path: Path, token: int) -> None:
    with pytest.raises(ValueError, match=rf"train\.bin: token id {token} does not fit into 16 bits"):
        write_tokens(tmp_path / "train.bin", [np.array([5]), np.array([7, token, 9])])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; remove it and make it with"),
        (b"\0" * 7, "7 bytes is not a whole number of 2-byte tokens"),
        (b"\0" * 8, "holds 4 tokens, but one window of train.context_length = 4 takes 5; set .* to at most 3, or"),
        (b"\0" * 2, "holds 1 tokens, but one window of train.context_length = 4 takes 5; use a larger corpus"),
    ],
)
def test_a_bad_file_is_refused_in_words_that_help(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "val.bin"
    path.write_bytes(content)
    assert "\n" not in _error(path)
    assert str(path) in _error(path)
    with pytest.raises(ValueError, match=message):
        open_tokens(path, 5)


def test_a_file_of_exactly_one_window_is_enough(tmp_path: Path) -> None:
    (tmp_path / "val.bin").write_bytes(b"\0" * 10)
    assert len(open_tokens(tmp_path / "val.bin", 5)) == 5


def test_a_missing_file_names_the_script_that_makes_it(tmp_path: Path) -> None:
    here = ROOT / "data" / "sotu" / "absent.bin"
    assert _error(here).endswith("no such file; make it with `python data/sotu/prepare.py`")
    elsewhere = tmp_path / "openwebtext" / "train.bin"
    assert _error(elsewhere).endswith(f"`python data/openwebtext/prepare.py --out {elsewhere.parent}`")
    unknown = tmp_path / "corpus" / "train.bin"
    assert f"`python data/sotu/prepare.py --out {unknown.parent}`" in _error(unknown)
    assert f"`python data/openwebtext/prepare.py --out {unknown.parent}`" in _error(unknown)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert "cannot be read: Is a directory" in _error(tmp_path)


def test_a_file_without_read_permission_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    write_tokens(path, [np.arange(9)])
    path.chmod(0)
    # root may read anything: become nobody first
    program = (
        "import os, sys; from data.corpus import open_tokens; os.geteuid() or os.setuid(65534)\n"
        "try: open_tokens(sys.argv[1], 1)\n"
        "except ValueError as error: print(error)"
    )
    command = [sys.executable, "-c", program, str(path)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.startswith(f"{path}: no permission to read it")


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    write_tokens(tmp_path / "train.bin", [np.arange(9)])
    (tmp_path / "plain").touch()
    assert os.stat(tmp_path / "train.bin").st_mode == os.stat(tmp_path / "plain").st_mode


def _error(path: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller looks at the words
        open_tokens(path, 5)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.bin").write_bytes(b"\1\0" * 1000)
    (tmp_path / "val.bin").write_bytes(b"\1\0" * 100)
    write_meta(tmp_path, META)
    return tmp_path


def test_reading_undoes_writing(folder: Path) -> None:
    assert read_meta(folder) == META
    assert read_meta(folder / "elsewhere") is None


def test_older_descriptions_are_read(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(OLDER)
    meta = read_meta(tmp_path)
    assert meta is not None
    assert (meta.source, meta.train.documents, meta.documents_left_out) == ("?*.txt", 6, 2)
    assert (meta.left_out, meta.val_fraction) == ("2 documents could not be read", 0.0005)


def test_hashes_are_those_of_the_files(folder: Path) -> None:
    assert sync_and_hash(folder) == {split: file_sha256(folder / f"{split}.bin") for split in ("train", "val")}
    # printf '\1\0%.0s' $(seq 100) | sha256sum
    assert file_sha256(folder / "val.bin") == "1115e762552ae9c13837cbf6949cab2dd2f8e9de9ea226c50236f9c888a5f25e"


def test_a_small_vocabulary_and_files_of_another_size_are_found(folder: Path) -> None:
    check_meta(META, folder, vocab_size=50257)
    with pytest.raises(ValueError, match=r"model\.vocab_size = 50256 is below the 50257 tokens of gpt2"):
        check_meta(META, folder, vocab_size=50256)
    os.truncate(folder / "val.bin", 198)
    with pytest.raises(ValueError, match=r"val\.bin: holds 99 tokens, but .*meta\.json says 100"):
        check_meta(META, folder, vocab_size=50257)


FIELDS = META.model_dump()


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
