"""data/documents.py: which files a user means, and what each kind of file holds."""

import gzip
import json
import os
import socket
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import documents
from data.documents import TextFiles, local_files


def read(path: Path | str, text_key: str = "text") -> list[str]:
    """The documents of a corpus, or what is wrong with them."""
    corpus = local_files([str(path)], text_key)
    return [str(document) for shard in range(len(corpus.sizes)) for document, _ in corpus.read(shard)]


def jsonl(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def write_parquet(path: Path, column: object, **options: Any) -> Path:
    with open(path, "wb") as file:  # pyarrow takes no name that is not UTF-8
        pq.write_table(column if isinstance(column, pa.Table) else pa.table({"text": column}), file, **options)
    return path


def test_lines_may_hold_what_json_reads_beyond_the_standard(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "byte order mark"}\n'
        b'\n \n{"score": NaN, "text": "not a number"}\n'
        b'{"id": 123456789012345678901234567890, "text": "large"}\n'
        b'{"text": "half \\ud800 a pair"}\n{"text": "no line break"}'
    )
    expected = ["byte order mark", "not a number", "large", "half \ud800 a pair", "no line break"]
    assert read(path) == expected
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read(tmp_path / "a.jsonl.gz") == expected


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfHello\r\n \xef\xbb\xbf")
    assert read(tmp_path / "a.txt") == ["Hello\r\n \ufeff"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "line 1: is not JSON ("),
        (b"[" * 100_000, "line 1: is not JSON ("),
        (b'{"text": "\xff"}', "line 1: is not JSON ("),
        (b"[]", 'line 1: is not a JSON object with a key "text"'),
        (b'{"body": "a", "n": 1}', 'line 1: has no key "text"; text is in "body": choose one with --text-key'),
        (b'{"text": null}', 'line 1: "text" is not text but null'),
    ],
    ids=range(6),
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(line + b'\n{"text": "good"}\n')
    bad, good = read(tmp_path / "a.jsonl")
    assert bad.startswith(f"{tmp_path}/a.jsonl, {reason}")
    assert good == "good"


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert read(tmp_path / "a.txt") == [f"{tmp_path}/a.txt: is not UTF-8 (byte 3)"]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n') + gzip.compress(b"lost")[:15])
    *good, bad = read(tmp_path / "b.jsonl.gz")
    assert good == ["a"]
    assert "b.jsonl.gz, near line 2: the compressed file is broken" in bad


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"body": ["a"], "url": ["c"]}, 'has no column "text"; text is in "body", "url": choose one with --text-key'),
        ({"text": [b"a"], "url": ["c"]}, 'does not hold text but binary in its column "text"; text is in "url"'),
        ({"text": [["a"]], "n": [1]}, 'does not hold text but list<element: string> in its column "text"; no other'),
    ],
    ids=range(3),
)
def test_a_parquet_file_without_texts_is_named(tmp_path: Path, table: dict[str, list[object]], reason: str) -> None:
    (bad,) = read(write_parquet(tmp_path / "a.parquet", pa.table(table)))
    assert bad.startswith(f"{tmp_path}/a.parquet: {reason}")


def test_a_cut_parquet_file_is_bad_and_others_are_read(tmp_path: Path) -> None:
    os.truncate(write_parquet(tmp_path / "a.parquet", ["lost"] * 500), 100)
    write_parquet(tmp_path / "b.parquet", ["x", "y"], row_group_size=1)
    bad, *good = read(tmp_path / "*.parquet")
    assert bad.startswith(f"{tmp_path}/a.parquet: ")
    assert good == ["x", "y"]


def test_a_parquet_file_without_rows_holds_no_documents(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", pa.array([], pa.string()))
    assert read(tmp_path / "a.parquet") == []
    write_parquet(tmp_path / "b.parquet", ["x"])
    assert read(tmp_path / "*.parquet") == ["x"]


def test_a_flipped_byte_of_a_parquet_page_is_found(tmp_path: Path) -> None:
    rows = [f"row {i} unlike" for i in range(20)]
    options = {"compression": "none", "write_page_checksum": True, "use_dictionary": False, "row_group_size": 10}
    path = write_parquet(tmp_path / "a.parquet", rows, **options)
    path.write_bytes(path.read_bytes().replace(b"row 15 unlike", b"row 15 unlikf", 1))
    *good, bad = read(path)
    assert good == rows[:10]
    assert bad.startswith(f"{path}, row group 1, row 0: the rest cannot be read")


def test_rows_that_are_not_text_are_bad_alone(tmp_path: Path) -> None:
    rows = [*(f"row {i}".encode() for i in range(600))]
    column = pa.array([*rows[:300], b"caf\xe9", None, b"", *rows[300:]], pa.binary()).view(pa.string())
    path = write_parquet(tmp_path / "a.parquet", column, row_group_size=200)
    found = read(path)
    assert found[300:303] == [
        f"{path}, row group 1, row 101: is not UTF-8 (byte 3)",
        f"{path}, row group 1, row 102: is null",
        "",
    ]
    assert found[:300] + found[303:] == [row.decode() for row in rows]


def test_a_column_of_categories_is_a_column_of_texts(tmp_path: Path) -> None:
    rows = ["a", "b", "a"]
    assert read(write_parquet(tmp_path / "a.parquet", pa.array(rows).dictionary_encode())) == rows


def test_a_parquet_file_that_cannot_be_read_now_is_not_bad(tmp_path: Path) -> None:
    class Refusing:
        def shard(self, *_: object) -> None:
            raise self.error

        def __init__(self, error: Exception) -> None:
            self.error = error

    path = write_parquet(tmp_path / "a.parquet", ["x"])
    for error in (OSError(5, "Failed"), pa.ArrowMemoryError("Failed"), RuntimeError("Failed")):
        rows = documents.Rows("test", Refusing(error), "text", (str(path),), ["a.parquet, row group 0"])
        with pytest.raises(ValueError, match=r"a\.parquet, row group 0, row 0: cannot be read now \(.*Failed"):
            list(rows.read(0))


def test_data_sets_of_the_hub_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the hub, a folder, which `datasets` loads in the same way."""
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    rows = [f"row {i}" for i in range(30)]
    for i in range(3):
        table = pa.table({"text": rows[10 * i : 10 * i + 10], "url": [1] * 10})
        write_parquet(tmp_path / f"train-{i}.parquet", table, row_group_size=4)
    corpus = documents.hub_dataset(str(tmp_path), None, None, "text")
    assert len(corpus.sizes) == 9
    assert [document for shard in range(9) for document, _ in corpus.read(shard)] == rows
    with pytest.raises(ValueError, match='has no column "body"; text is in "text": choose one with --text-key'):
        documents.hub_dataset(str(tmp_path), None, None, "body")


def test_any_name_of_a_file_is_taken(tmp_path: Path) -> None:
    names = ["a[1]", "b *?", "ü%20", "{c,d}", "e$HOME", "~f", os.fsdecode(b"\xff")]
    for name in names:
        (tmp_path / f"{name}.txt").write_text(ascii(name))
        write_parquet(tmp_path / f"{name}.parquet", [ascii(name)])
        assert read(tmp_path / f"{name}.txt") == [ascii(name)]
        assert read(tmp_path / f"{name}.parquet") == [ascii(name)]
    assert len(read(tmp_path / "*.txt")) == len(read(tmp_path / "*.parquet")) == len(names)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("*.jsonl", "matches no file"),
        ("x" * 300, "matches no file"),
        ("a\0b", "matches no file"),
        ("empty", "matches no file of a known kind below it"),
        ("*.csv", r"a\.csv: does not end in one of \.txt, \.jsonl"),
        ("*", r"a\.csv: does not end in|finds \.parquet files and others"),
        ("mixed", r"finds \.parquet files and others; prepare one kind at a time"),
    ],
    ids=range(7),
)
def test_patterns_without_documents_are_refused(tmp_path: Path, pattern: str, reason: str) -> None:
    (tmp_path / "a.csv").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    for name in ("a.txt", "a.parquet"):
        (tmp_path / "mixed" / name).touch()
    with pytest.raises(ValueError, match=reason):
        local_files([f"{tmp_path}/{pattern}"], "text")


def test_a_file_takes_little_more_memory_than_its_path(tmp_path: Path) -> None:
    n = 2000
    for i in range(n):
        (tmp_path / f"{i}.txt").touch()
    local_files([f"{tmp_path}/*.txt"], "text")  # imports and caches
    tracemalloc.start()
    try:
        corpus = local_files([f"{tmp_path}/*.txt"], "text")
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        corpus.fingerprint()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(corpus, TextFiles)
    assert (
        held / n < sys.getsizeof(corpus.files[-1]) + 6 * 8
    )  # the path, a reference and a size, and what lists grow by
    assert peak - held < 100_000


def test_a_hub_without_an_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "ANSWER_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        with pytest.raises(ValueError, match=r"a/b cannot be loaded \(.*timed out"):
            documents.hub_dataset("a/b", None, None, "text")
