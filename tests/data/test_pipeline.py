"""A corpus in files to a data folder, as `python data/openwebtext/prepare.py --input` does it."""

import contextlib
import errno
import fcntl
import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import documents, pipeline, placement, tokenise
from data.documents import Source, UnitReader, find_files, plan_units
from data.encoders import Encoder, Tiktoken, best_encoder, build_encoder
from data.meta import file_sha256, read_meta, sync_and_hash
from data.openwebtext import prepare as openwebtext
from data.placement import lay_out
from data.progress import Progress
from data.spool import Part, part_path, read_lengths, read_part
from data.tokenise import Job
from data.tokenizer import gpt2_encoding

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "data" / "openwebtext" / "prepare.py"
WORDS = ["the", "<|endoftext|>", "Décentralisé", "한국", "\n\n", "1,024", "👩‍👧", "gossip", "don't", "\u0c5c's"]
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12 on fork beside threads


def texts(n: int, *, longest: int = 40) -> list[str]:
    random = np.random.default_rng(2357)
    return [" ".join(random.choice(WORDS, size)) for size in random.integers(0, longest, n)]


def jsonl(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def nanogpt(rows: list[str]) -> dict[str, bytes]:
    """What nanoGPT's data/openwebtext/prepare.py stores, as a plain loop over datasets' own split."""
    encoding = gpt2_encoding()
    splits = datasets.Dataset.from_dict({"text": rows}).train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    splits["val"] = splits.pop("test")
    return {
        str(split): b"".join(
            np.array([*encoding.encode_ordinary(text), encoding.eot_token], dtype="<u2").tobytes()
            for text in part["text"]
        )
        for split, part in splits.items()
    }


def prepared(out: Path) -> dict[str, bytes]:
    return {split: (out / f"{split}.bin").read_bytes() for split in ("train", "val")}


def part_paths(out: Path) -> list[Path]:
    """The parts in the spool, in the order of the documents."""
    return sorted(out.glob(".prepare/**/*.part"))


def prepare(path: Path, out: Path, *, num_proc: int = 1, limit: int | None = None, skip_bad: bool = False) -> None:
    job = Job(Source("test", find_files([str(path)])), build_encoder(best_encoder()), limit, skip_bad)
    pipeline.prepare(job, out, num_proc=num_proc)


def run(*args: object, returncode: int = 0, cwd: Path | str = "/") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == returncode, done.stderr
    return done


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units and parts of which a small corpus has many, and no corpus that is too small for processes."""
    monkeypatch.setattr(documents, "UNIT_BYTES", 10_000)
    monkeypatch.setattr(tokenise, "_PART_TOKENS", 700)
    monkeypatch.setattr(tokenise, "_SMALL_BYTES", 1)
    monkeypatch.setattr(placement, "_SMALL_BYTES", 1)
    monkeypatch.setattr(placement, "_SYNC_BYTES", 20_000)


@pytest.mark.parametrize("n", [2, 3, 1999, 2000, 2001, 12_345])
def test_split_and_order_are_those_of_datasets(n: int) -> None:
    splits = datasets.Dataset.from_dict({"i": list(range(n))}).train_test_split(
        test_size=0.0005, seed=2357, shuffle=True
    )
    layout = lay_out(np.ones(n, np.uint32))  # documents of one token: the start is the rank
    order = np.argsort(layout.starts).tolist()
    assert order[: layout.n_val] == list(splits["test"]["i"])
    assert order[layout.n_val :] == list(splits["train"]["i"])


@pytest.mark.parametrize("num_proc", [1, 3])
@pytest.mark.usefixtures("small_units")
def test_files_are_byte_for_byte_nanogpts(tmp_path: Path, num_proc: int) -> None:
    rows = texts(2500)
    prepare(jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out", num_proc=num_proc)
    assert prepared(tmp_path / "out") == nanogpt(rows)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["meta.json", "train.bin", "val.bin"]


@pytest.mark.usefixtures("small_units")
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    rows = texts(300)
    expected = nanogpt(rows)
    paths = [tmp_path / f"a{suffix}" for suffix in (".jsonl", ".jsonl.gz", ".parquet")]
    jsonl(paths[0], rows)
    paths[1].write_bytes(gzip.compress(paths[0].read_bytes()))
    pq.write_table(pa.table({"text": rows}), paths[2], row_group_size=70)
    (tmp_path / "texts").mkdir()
    for i, row in enumerate(rows):
        (tmp_path / "texts" / f"{i:03}.txt").write_bytes(row.encode())
    for path in [*paths, tmp_path / "texts" / "*.txt"]:
        prepare(path, tmp_path / "out" / path.name, num_proc=2)
        assert prepared(tmp_path / "out" / path.name) == expected


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("limit", [None, 700])
def test_progress_is_seen_inside_a_large_unit_and_ends_where_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, limit: int | None
) -> None:
    """A .gz and a row group are one unit each, whatever their size."""
    rows = [os.urandom(500).hex() for _ in range(1000)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    if suffix == ".jsonl.gz":
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    elif suffix == ".parquet":
        pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet")
    path = tmp_path / f"a{suffix}"
    shares: list[float] = []

    class Recorded(Progress):
        def add(self, n: int, n_tokens: int) -> None:
            super().add(n, n_tokens)
            shares.append(self.bar.n / self.total)

    monkeypatch.setattr(tokenise, "Progress", Recorded)
    monkeypatch.setattr(tokenise, "_PART_TOKENS", 20_000)
    monkeypatch.setattr(documents, "UNIT_BYTES", 100_000)
    prepare(path, tmp_path / "out", limit=limit)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    middle = shares[len(shares) // 2]
    assert 0.3 < middle < 0.8


@pytest.mark.parametrize("unit_bytes", [1, 30, 31, 100, 10**6])
def test_a_line_is_read_once_wherever_units_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int
) -> None:
    monkeypatch.setattr(documents, "UNIT_BYTES", unit_bytes)
    rows = texts(20, longest=6)
    path = jsonl(tmp_path / "a.jsonl", rows)
    path.write_text("\n \n" + path.read_text().rstrip("\n"))  # blank lines are none, and the last needs no line break
    source = Source("test", (str(path),))
    assert [text for unit in plan_units(source) for text in UnitReader(unit, "text")] == rows


@pytest.mark.usefixtures("small_units")
def test_a_document_may_be_longer_than_a_part(tmp_path: Path) -> None:
    rows = [*texts(30), "long " * 2000, *texts(30), "longer " * 5000, *texts(30)]
    prepare(jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out", num_proc=1)
    assert prepared(tmp_path / "out") == nanogpt(rows)


def test_a_line_may_be_what_json_reads_beyond_the_standard(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "byte order mark"}\n'
        b'{"score": NaN, "text": "not a number"}\n'
        b'{"id": 123456789012345678901234567890, "text": "large"}\n'
        b'{"text": "half \\ud800 a pair"}\n'
    )
    (unit,) = plan_units(source := Source("test", (str(path),)))
    assert list(UnitReader(unit, source.text_key)) == ["byte order mark", "not a number", "large", "half \ud800 a pair"]


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.usefixtures("small_units")
def test_a_limit_takes_the_first_documents_and_splits_those(tmp_path: Path, num_proc: int) -> None:
    rows = texts(1500)
    path = jsonl(tmp_path / "a.jsonl", rows)
    for limit in (2, 777, 5000):
        prepare(path, tmp_path / str(limit), num_proc=num_proc, limit=limit)
        assert prepared(tmp_path / str(limit)) == nanogpt(rows[:limit])


@pytest.mark.parametrize("num_proc", [1, 3])
@pytest.mark.usefixtures("small_units")
def test_behind_a_limit_nothing_counts_whatever_the_number_of_processes(tmp_path: Path, num_proc: int) -> None:
    rows = texts(300)
    path, expected = jsonl(tmp_path / "a.jsonl", rows), nanogpt(rows[:50])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:20], "before", *lines[20:50], *("behind",) * 3, *lines[50:], "behind"] * 2))
    prepare(path, tmp_path / "out", num_proc=num_proc, limit=50, skip_bad=True)
    meta = read_meta(tmp_path / "out")
    assert meta is not None
    assert (prepared(tmp_path / "out"), meta.documents_left_out) == (expected, 1)
    with pytest.raises(ValueError, match=r"line 21: is no JSON"):
        prepare(path, tmp_path / "out", num_proc=num_proc, limit=50)
    path.write_text(path.read_text().replace("before\n", ""))
    prepare(path, tmp_path / "out", num_proc=num_proc, limit=50)
    assert prepared(tmp_path / "out") == expected


def lines_until_a_limit(n_units: int) -> int:
    """How many lines of Python hand out the units, of two documents each, of which a limit takes three quarters."""
    n_lines, parts, limit = 0, [], n_units * 3 // 2

    def count(*_: object) -> Callable[..., Any]:
        nonlocal n_lines
        n_lines += 1
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        for number, needed in tokenise._needed(n_units, parts, limit):
            assert needed == limit - 2 * max(0, number - 2)
            if number >= 2:  # two processes are at work
                parts.append(Part(part_path(Path(), number - 2, 0), 2, 0, True, 9, 0))
    finally:
        sys.settrace(before)
    assert len(parts) == limit // 2
    return n_lines


def test_a_limit_costs_no_more_for_each_unit_where_there_are_many() -> None:
    assert lines_until_a_limit(2000) < 11 * lines_until_a_limit(200)  # some 80 times if each looked at all before


def test_meta_json_tells_counts_hashes_and_source(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", texts(50))
    done = run("--input", "*.jsonl", "--out", "mine", "--num-proc", 2, cwd=tmp_path)
    meta = read_meta(tmp_path / "mine")
    assert meta is not None
    assert (meta.source, meta.tokenizer, meta.vocab_size) == ("*.jsonl", "gpt2", 50257)
    for split, n_documents in [("train", 49), ("val", 1)]:
        described = getattr(meta, split)
        file = tmp_path / "mine" / f"{split}.bin"
        assert described.documents == n_documents
        assert described.tokens * 2 == file.stat().st_size
        assert described.sha256 == file_sha256(file)
        assert described.sha256 in done.stdout
    before = file.stat().st_ino
    assert "there already" in run("--input", "*.jsonl", "--out", "mine", cwd=tmp_path).stdout
    assert file.stat().st_ino == before


def test_a_changed_source_is_prepared_anew(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", texts(20))
    run("--input", path, "--out", tmp_path / "out")
    jsonl(path, texts(30))
    run("--input", path, "--out", tmp_path / "out")
    assert prepared(tmp_path / "out") == nanogpt(texts(30))


def test_a_source_that_changes_while_it_is_read_is_not_taken_for_the_one_that_was_read(tmp_path: Path) -> None:
    path, out = jsonl(tmp_path / "a.jsonl", texts(20)), tmp_path / "out"
    encoder = Wrapped()
    encoder.before = lambda: os.utime(path, (0, len(encoder.texts)))
    job = Job(Source("texts", (str(path),)), cast(Encoder, encoder))
    with pytest.raises(ValueError, match=r"^texts: changed while it was read"):
        pipeline.prepare(job, out, num_proc=1)
    assert not out.exists()


def test_a_source_that_changes_after_it_was_read_is_prepared_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = jsonl(tmp_path / "a.jsonl", texts(20)), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "settle", lambda folder: (jsonl(path, texts(30)), sync_and_hash(folder))[1])
        prepare(path, out)
    assert prepared(out) == nanogpt(texts(20))
    assert not pipeline.is_prepared(out, Source("test", (str(path),)), None, skip_bad=False)


def test_a_file_takes_little_more_memory_than_its_path(tmp_path: Path) -> None:
    n = 2000
    for i in range(n):
        (tmp_path / f"{i}.txt").touch()
    tracemalloc.start()
    try:
        source = Source("test", find_files([f"{tmp_path}/*.txt"]))
        units = plan_units(source)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        source.fingerprint()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [len(unit.paths) for unit in units] == [n]
    assert held / n < sys.getsizeof(source.files[0]) + 3 * 8  # the path, and references
    assert peak - held < 100_000


def test_files_are_in_order_of_their_folders_and_names(tmp_path: Path) -> None:
    names = ["a/b.txt", "a/c.txt", "a-b.txt", "a.txt", "b/a.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    patterns = [f"{tmp_path}/{pattern}" for pattern in ("*.txt", "**/*.txt", "./a/../a.txt")]
    assert find_files(patterns[:2]) == tuple(str(tmp_path / name) for name in names)
    assert len(find_files(patterns)) == 1 + len(names)


class Killed(BaseException):
    """Stands for the end of the process: nothing but the operating system cleans up."""


def killed_after(
    n: int, function: Callable[..., Any], counts: Callable[..., bool] = lambda *_: True
) -> Callable[..., Any]:
    """The function, of whose calls that count the first n are carried out."""
    numbers = itertools.count()

    def call(*args: Any, **options: Any) -> Any:
        if counts(*args) and next(numbers) == n:
            raise Killed
        return function(*args, **options)

    return call


class Wrapped:
    """An encoder that notes what it encodes, and errs in one document, or all longer ones, or is killed there."""

    def __init__(self, *, errs_at: int | None = None, killed_at: int | None = None, errs_behind: int = 2**40) -> None:
        self.encoder = build_encoder("tiktoken")
        self.encoder.reference = Tiktoken()
        self.texts: list[str] = []
        self.errs_at = errs_at
        self.errs_behind = errs_behind
        self.before: Callable[[], object] = lambda: None
        self.killed_at = killed_at

    def __getattr__(self, name: str) -> object:
        return getattr(self.encoder, name)

    def __call__(self, text: str) -> object:
        if len(self.texts) == self.killed_at:
            raise Killed
        self.texts.append(text)
        self.before()
        return self.encoder(text) + (len(self.texts) == self.errs_at or len(text) > self.errs_behind)


@pytest.mark.usefixtures("small_units")
def test_pass_1_goes_on_after_its_finished_parts(tmp_path: Path) -> None:
    rows = texts(1000)
    source = Source("test", (str(jsonl(tmp_path / "a.jsonl", rows)),))
    out = tmp_path / "out"
    first, second = Wrapped(killed_at=600), Wrapped()
    with pytest.raises(Killed):
        pipeline.prepare(Job(source, cast(Encoder, first)), out, num_proc=1)
    parts = [part for part in map(read_part, part_paths(out)) if part]
    n_finished = sum(part.n_documents for part in parts)
    assert 500 < n_finished < 600
    assert not all(part.last for part in parts)  # also in the middle of a unit
    pipeline.prepare(Job(source, cast(Encoder, second)), out, num_proc=1)
    assert second.texts == rows[n_finished:]
    assert prepared(out) == nanogpt(rows)


@pytest.mark.usefixtures("small_units")
def test_short_documents_and_those_left_out_fill_a_part_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "_PART_DOCUMENTS", 64)
    rows = [""] * 300 + texts(10)
    path = jsonl(tmp_path / "a.jsonl", rows)
    path.write_text("{}\n" * 200 + path.read_text())
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(placement, "_place_part", killed_after(0, placement._place_part))
        with pytest.raises(Killed):
            prepare(path, out, skip_bad=True)
    parts = [part for part in map(read_part, part_paths(out)) if part]
    assert all(len(read_lengths(part)) == part.n_documents + part.n_bad <= 64 for part in parts)
    assert sum(part.n_documents for part in parts) == 310
    prepare(path, out, skip_bad=True)
    assert prepared(out) == nanogpt(rows)


@pytest.mark.usefixtures("small_units")
def test_a_part_that_is_written_after_its_job_is_none_of_the_next(tmp_path: Path) -> None:
    """As by a process that outlived kill -9 of its parent, and notices when its part is written."""
    rows = texts(1000)
    old, new = jsonl(tmp_path / "a.jsonl", rows[:900]), jsonl(tmp_path / "b.jsonl", rows[100:])
    out = tmp_path / "out"

    def go_on(path: Path, killed_at: int | None) -> None:
        job = Job(Source("test", (str(path),)), cast(Encoder, Wrapped(killed_at=killed_at)))
        with contextlib.suppress(Killed):
            pipeline.prepare(job, out, num_proc=1)

    go_on(old, 300)
    late = part_paths(out)[0]
    part = late.read_bytes()
    go_on(new, 200)
    with contextlib.suppress(FileNotFoundError):
        late.write_bytes(part)
    go_on(new, None)
    assert prepared(out) == nanogpt(rows[100:])


@pytest.mark.usefixtures("small_units")
def test_a_damaged_part_is_done_again(tmp_path: Path) -> None:
    rows = texts(1000)
    source = Source("test", (str(jsonl(tmp_path / "a.jsonl", rows)),))
    out = tmp_path / "out"
    with pytest.raises(Killed):
        pipeline.prepare(Job(source, cast(Encoder, Wrapped(killed_at=900))), out, num_proc=1)
    whole, cut, *_ = part_paths(out)
    data = bytearray(whole.read_bytes())
    data[-1] ^= 1  # as after a power failure: the size is right
    whole.write_bytes(data)
    os.truncate(cut, 1000)
    pipeline.prepare(Job(source, cast(Encoder, Wrapped())), out, num_proc=1)
    assert prepared(out) == nanogpt(rows)


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("n_placed", [0, 1, 7])
def test_pass_2_goes_on_with_the_parts_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_placed: int
) -> None:
    rows = texts(1000)
    path, out = jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out"
    place_some = killed_after(n_placed, placement._place_part)
    monkeypatch.setattr(placement, "_SYNC_BYTES", 1)  # each part is deleted when it is placed
    with monkeypatch.context() as patch:
        patch.setattr(placement, "_place_part", place_some)
        with pytest.raises(Killed):
            prepare(path, out)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "tokenise", None)  # pass 1 is not done again
        prepare(path, out)
    assert prepared(out) == nanogpt(rows)


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("n_removed", [0, 1, 2, 4, 8])
def test_a_spool_that_is_half_removed_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_removed: int
) -> None:
    rows = texts(1000)
    path, out = jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out"
    monkeypatch.setattr(placement, "_SYNC_BYTES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(placement, "_place_part", killed_after(3, placement._place_part))
        with pytest.raises(Killed):
            prepare(path, out)
    assert len(part_paths(out)) > 8
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", killed_after(n_removed, os.unlink))
        with pytest.raises(Killed):
            prepare(jsonl(tmp_path / "b.jsonl", rows[:20]), out)  # of another job
    prepare(path, out)
    assert prepared(out) == nanogpt(rows)


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("n_removed", [0, 1, 2])
def test_a_plan_without_the_bad_documents_goes_before_the_parts_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_removed: int
) -> None:
    rows = texts(1000)
    path, out = jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out"
    path.write_text(path.read_text() + "[]\n")
    monkeypatch.setattr(placement, "_SYNC_BYTES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(placement, "_place_part", killed_after(3, placement._place_part))
        with pytest.raises(Killed):
            prepare(path, out, skip_bad=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", killed_after(n_removed, os.unlink))
        with pytest.raises((Killed, ValueError)):
            prepare(path, out)
    prepare(path, out, skip_bad=True)
    assert prepared(out) == nanogpt(rows)


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_file_that_is_lost_with_what_was_placed_in_it_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    rows = texts(1000)
    path, out = jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out"
    monkeypatch.setattr(placement, "_SYNC_BYTES", 1)  # each part is deleted when it is placed
    with monkeypatch.context() as patch:
        patch.setattr(placement, "_place_part", killed_after(3, placement._place_part))
        with pytest.raises(Killed):
            prepare(path, out)
    (lost,) = out.glob(f".prepare/*/{split}.bin")
    lost.unlink()
    prepare(path, out)
    assert prepared(out) == nanogpt(rows)


def test_files_that_were_lost_before_they_had_their_names_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = texts(50)
    path, out = jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out"
    prepare(jsonl(tmp_path / "b.jsonl", rows[::-1]), out)  # of the same size, nearly
    assert prepared(out) != nanogpt(rows)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_publish", killed_after(0, pipeline._publish))
        with pytest.raises(Killed):
            prepare(path, out)
    for lost in out.glob(".prepare/**/train.bin"):
        lost.unlink()
    assert not pipeline.is_prepared(out, Source("test", (str(tmp_path / "b.jsonl"),)), None, skip_bad=False)
    prepare(path, out)
    assert prepared(out) == nanogpt(rows)


@pytest.mark.parametrize("n_moved", [0, 1, 2, 3])
def test_files_that_are_whole_only_need_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_moved: int
) -> None:
    rows = texts(50)
    path, out = jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out"
    replace = Path.replace
    replace_some = killed_after(n_moved, replace, counts=lambda _, target: target.parent == out)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_some)
        if n_moved < 3:
            with pytest.raises(Killed):
                prepare(path, out)
            patch.setattr(Path, "replace", replace)
            patch.setattr(pipeline, "_fill", None)
        prepare(path, out)
    assert prepared(out) == nanogpt(rows)
    assert sorted(file.name for file in out.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_a_second_run_at_the_same_place_is_refused_and_leaves_the_spool_of_the_first_alone(tmp_path: Path) -> None:
    path, spool = jsonl(tmp_path / "a.jsonl", texts(9)), tmp_path / "out" / ".prepare"
    (spool / "job").mkdir(parents=True)  # a first run has just started
    with open(spool / "lock", "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        done = run("--input", path, "--out", tmp_path / "out", returncode=2)
    assert "out: another process is preparing a corpus here" in done.stderr
    assert sorted(path.name for path in spool.iterdir()) == ["job", "lock"]


@pytest.mark.fault
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_no_process_and_the_next_one_ends_it(tmp_path: Path, how: signal.Signals) -> None:
    rows = texts(1000, longest=200) * 25  # 20 MB: three units
    path, out = jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out"
    command = [sys.executable, str(SCRIPT), "--input", str(path), "--out", str(out), "--num-proc", "2"]
    process = subprocess.Popen([*command, "--tokenizer", "tiktoken"], stderr=subprocess.PIPE, start_new_session=True)
    while not list(out.glob(".prepare/*/*.part")) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.2)  # Python takes a SIGINT in the middle of an import badly, and that of tqdm is just now
    children = _session(process.pid) - {process.pid}
    assert children
    os.kill(process.pid, how)
    _, error = process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while _session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _session(process.pid)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert b"Traceback" not in error
    assert not list(out.glob("*"))[1:]  # nothing but the spool
    assert list(out.glob(".prepare/*/*.part"))
    run(*command[2:], "--tokenizer", "tiktoken")
    assert file_sha256(out / "train.bin") == _sha256_of(rows, tmp_path)


def _sha256_of(rows: list[str], folder: Path) -> str:
    prepare(jsonl(folder / "again.jsonl", rows), folder / "again")
    return file_sha256(folder / "again" / "train.bin")


def _session(session: int) -> set[int]:
    """The processes of a session that run."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own = stat.read_text().rsplit(")", 1)[1].split()[:4]
        except OSError:
            continue
        if int(own) == session and state != "Z":
            found.add(int(stat.parent.name))
    return found


def _bad_jsonl(folder: Path) -> Path:
    path = jsonl(folder / "b.jsonl", texts(9))
    lines = path.read_text().splitlines()
    lines[4] = lines[4][:-3]
    path.write_text("\n".join(lines))
    return path


def _no_text(folder: Path) -> Path:
    path = folder / "b.parquet"
    pq.write_table(pa.table({"body": ["a", "b"], "url": ["c", "d"]}), path)
    return path


def _bytes(folder: Path) -> Path:
    path = folder / "b.parquet"
    pq.write_table(pa.table({"text": [b"a", b"b"], "n": [1, 2], "url": ["c", "d"]}), path)
    return path


def _lists(folder: Path) -> Path:
    path = folder / "b.parquet"
    pq.write_table(pa.table({"text": [["a"], ["b"]], "n": [1, 2]}), path)
    return path


def _broken_parquet(folder: Path) -> Path:
    path = folder / "b.parquet"
    pq.write_table(pa.table({"text": texts(500)}), path)
    os.truncate(path, 2000)
    return path


def _cut_gz(folder: Path) -> Path:
    path = folder / "b.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-10])
    return path


def _one_document(folder: Path) -> Path:
    (folder / "b.txt").write_text("alone")
    return folder / "b.txt"


def _latin_1(folder: Path) -> Path:
    (folder / "b.txt").write_bytes(b"caf\xe9")
    return folder / "b.txt"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: folder / "*.jsonl", "*.jsonl: matches no file"),
        (_bad_jsonl, "b.jsonl, line 5: is no JSON"),
        (_no_text, 'b.parquet: has no column "text"; text is in "body", "url": choose one with --text-key'),
        (_bytes, 'holds no text but binary in its column "text"; text is in "url": choose one with --text-key'),
        (_lists, 'holds no text but list<element: string> in its column "text"; no other holds text; --skip-bad'),
        (_broken_parquet, "b.parquet: is a broken parquet file"),
        (_cut_gz, "b.jsonl.gz, near line 9"),
        (_one_document, "holds 1 document, but train and val need one each; cut the text"),
        (_latin_1, "b.txt: is not UTF-8 (byte 3)"),
    ],
    ids=lambda value: getattr(value, "__name__", "").strip("_<>") or None,
)
def test_bad_input_is_one_line_and_leaves_older_files_alone(tmp_path: Path, make: object, expected: str) -> None:
    assert callable(make)
    pattern = make(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "train.bin").write_bytes(b"old")
    for folder in (out, tmp_path / "new" / "folder"):
        done = run("--input", pattern, "--out", folder, returncode=2)
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert expected in done.stderr
    assert [path.name for path in out.iterdir()] == ["train.bin"]
    assert (out / "train.bin").read_bytes() == b"old"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, "Too many open files"), OSError(errno.EIO, "Failed"), pa.ArrowMemoryError("Failed")]
)
def test_a_parquet_file_that_cannot_be_read_now_is_not_called_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise error

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts(20)}), path)
    (unit,) = plan_units(Source("test", (str(path),)))
    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetFile, "iter_batches", refuse)
        with pytest.raises(OSError, match=r"a\.parquet"):
            list(UnitReader(unit, "text"))
    monkeypatch.setattr(pq, "ParquetFile", refuse)
    for read in (lambda: plan_units(Source("test", (str(path),))), lambda: list(UnitReader(unit, "text"))):
        with pytest.raises(OSError, match=r"a\.parquet"):
            read()


def test_a_flipped_byte_of_a_page_with_a_checksum_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = ["unlike any other", *texts(20)]
    pq.write_table(pa.table({"text": rows}), path, compression="none", write_page_checksum=True, use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(b"unlike any", b"unlike ann", 1))
    (unit,) = plan_units(Source("test", (str(path),)))
    assert str(next(iter(UnitReader(unit, "text")))).startswith(f"{path}: is a broken parquet file")


def test_a_column_of_categories_is_a_column_of_texts(tmp_path: Path) -> None:
    rows = texts(20)
    pq.write_table(pa.table({"text": pa.array(rows).dictionary_encode()}), tmp_path / "a.parquet")
    (unit,) = plan_units(Source("test", (str(tmp_path / "a.parquet"),)))
    assert list(UnitReader(unit, "text")) == rows


def test_a_late_mistake_says_where_the_work_before_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokenise, "_PART_TOKENS", 100)
    path = jsonl(tmp_path / "a.jsonl", texts(50))
    with open(path, "a") as file:
        file.write("broken\n")
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--input", str(path), "--out", str(out)])
    assert openwebtext.main() == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "a.jsonl, line 51: is no JSON" in line
    assert f"what is done is in {out / '.prepare'}" in line
    assert part_paths(out)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_a_row_that_is_not_utf_8_is_left_out_alone(tmp_path: Path, kind: pa.DataType) -> None:
    rows: list[bytes | None] = [row.encode() for row in texts(600)]
    rows[300], rows[301], rows[302] = b"caf\xe9", None, b""
    path = tmp_path / "a.parquet"
    binary = pa.large_binary() if kind == pa.large_string() else pa.binary()
    pq.write_table(pa.table({"text": pa.array(rows, binary).view(kind)}), path)
    (unit,) = plan_units(Source("test", (str(path),)))
    read = [document if isinstance(document, str) else str(document) for document in UnitReader(unit, "text")]
    assert read[300:303] == [f"{path}, row 301: is not UTF-8 (byte 3)", f'{path}, row 302: "text" is null', ""]
    assert read[:300] + read[303:] == texts(600)[:300] + texts(600)[303:]


def test_what_skip_bad_prepared_is_not_what_a_run_without_it_wants(tmp_path: Path) -> None:
    path, out = _bad_jsonl(tmp_path), tmp_path / "out"
    run("--input", path, "--out", out, "--skip-bad")
    assert "there already" in run("--input", path, "--out", out, "--skip-bad").stdout
    assert "line 5" in run("--input", path, "--out", out, returncode=2).stderr
    assert "there already" in run("--input", path, "--out", out, "--skip-bad").stdout


def test_skip_bad_counts_and_leaves_out(tmp_path: Path) -> None:
    path = _bad_jsonl(tmp_path)
    path.write_text(path.read_text() + '\n{"text": null}\n[]\n{"body": "x"}\n')
    done = run("--input", path, "--out", tmp_path / "out", "--skip-bad")
    assert "4 documents could not be read" in done.stdout
    rows = texts(9)
    assert prepared(tmp_path / "out") == nanogpt(rows[:4] + rows[5:])
    meta = read_meta(tmp_path / "out")
    assert meta is not None
    assert meta.documents_left_out == 4


def _column_missing(folder: Path) -> Path:
    pq.write_table(pa.table({"text": texts(3)}), folder / "1.parquet")
    pq.write_table(pa.table({"body": texts(1000)}), folder / "2.parquet", row_group_size=300)
    return folder / "*.parquet"


def _row_group_damaged(folder: Path) -> Path:
    path = folder / "1.parquet"
    pq.write_table(pa.table({"text": texts(1000)}), path, row_group_size=400, compression="none", use_dictionary=False)
    with open(path, "rb+") as file:
        file.seek(pq.read_metadata(path).row_group(1).column(0).data_page_offset)
        file.write(bytes(100))
    return path


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize(
    ("make", "n_lost", "n_left", "reason"),
    [
        (_column_missing, 1000, 3, '2.parquet: has no column "text"'),
        (_row_group_damaged, 400, 600, "1.parquet, after row 400: is a broken parquet file"),
    ],
)
@pytest.mark.usefixtures("small_units")
def test_the_rows_of_a_parquet_file_that_are_lost_are_counted(
    tmp_path: Path, num_proc: int, make: Callable[[Path], Path], n_lost: int, n_left: int, reason: str
) -> None:
    prepare(make(tmp_path), tmp_path / "out", num_proc=num_proc, skip_bad=True)
    meta = read_meta(tmp_path / "out")
    assert meta is not None
    assert (meta.documents_left_out, meta.train.documents + meta.val.documents) == (n_lost, n_left)
    assert meta.left_out.startswith(
        f"{n_lost:,} documents could not be read and had to be left out; the first: {tmp_path}/{reason}"
    )


def _cut_after(rows: list[str], path: Path) -> None:
    """A .jsonl.gz that breaks off behind these rows."""
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode()) + gzip.compress(b"lost")[:15])


@pytest.mark.parametrize("num_proc", [1, 3])
@pytest.mark.parametrize("limit", [None, 299, 240])
@pytest.mark.usefixtures("small_units")
def test_files_that_break_off_are_named_and_not_counted_as_a_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_proc: int, limit: int | None
) -> None:
    rows, out = texts(300), tmp_path / "out"
    for i in range(5):
        _cut_after(rows[60 * i : 60 * i + 60], tmp_path / f"{i}.jsonl.gz")
    (tmp_path / "5.parquet").write_bytes(b"no parquet")
    for killed_in in ("save", "place"):  # the next run reads the parts, then the plan
        with monkeypatch.context() as patch:
            patch.setattr(placement, killed_in, killed_after(0, getattr(placement, killed_in)))
            with pytest.raises(Killed):
                prepare(tmp_path / "*.*", out, num_proc=num_proc, limit=limit, skip_bad=True)
    prepare(tmp_path / "*.*", out, num_proc=num_proc, limit=limit, skip_bad=True)
    meta = read_meta(out)
    assert meta is not None
    assert prepared(out) == nanogpt(rows[:limit])
    assert meta.documents_left_out == 0
    names = ", ".join(f"{tmp_path}/{i}.jsonl.gz" for i in range(3))
    lost = {None: f"6 files ({names}, ...)", 299: f"4 files ({names}, ...)", 240: f"3 files ({names})"}[limit]
    assert meta.left_out.startswith(
        f"an unknown rest of {lost} could not be read and had to be left out; the first: {tmp_path}/0.jsonl.gz, "
        "near line 61: the compressed file is broken"
    )
    source = Source("test", find_files([str(tmp_path / "*.*")]))
    assert [pipeline.is_prepared(out, source, limit, skip_bad=skip_bad) for skip_bad in (True, False)] == [True, False]


@pytest.mark.parametrize(
    ("make", "options", "expected"),
    [
        (_no_text, ["--skip-bad"], "2 documents could not be read and had to be left out; the first: b.parquet: has"),
        (_bad_jsonl, ["--limit", "1"], "holds 1 document, but train and val need one each; give --limit 2 or more"),
    ],
)
def test_too_few_documents_are_said_with_what_would_help(
    tmp_path: Path, make: Callable[[Path], Path], options: list[str], expected: str
) -> None:
    done = run("--input", make(tmp_path).name, "--out", "out", *options, returncode=2, cwd=tmp_path)
    assert expected in done.stderr
    assert ".txt" not in done.stderr


def test_ids_that_are_not_the_references_stop_the_run_before_there_are_files(tmp_path: Path) -> None:
    source = Source("test", (str(jsonl(tmp_path / "a.jsonl", texts(50))),))
    job = Job(source, cast(Encoder, Wrapped(errs_at=30)))
    with pytest.raises(ValueError, match="gives other ids than tiktoken for the document that begins"):
        pipeline.prepare(job, tmp_path / "out", num_proc=1)
    assert not (tmp_path / "out").exists()


def test_of_long_documents_the_beginning_is_compared_with_the_reference(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("word " * 100_000)
    job = Job(Source("test", (str(path),) * 2), cast(Encoder, Wrapped(errs_behind=1000)))
    with pytest.raises(ValueError, match="gives other ids than tiktoken for the document that begins 'word word"):
        pipeline.prepare(job, tmp_path / "out", num_proc=1)


@pytest.mark.fault
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system: needs root")
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        rows = texts(10_000)
        path = jsonl(tmp_path / "a.jsonl", rows)
        done = run("--input", path, "--out", disk / "out", "--num-proc", 2, returncode=2)
        assert "No space left on device" in done.stderr
        assert "Traceback" not in done.stderr
        assert not list(disk.glob("out/*.bin"))
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        run("--input", path, "--out", disk / "out", "--num-proc", 2)
        assert prepared(disk / "out") == nanogpt(rows)
    finally:
        subprocess.run(["umount", disk], check=True)
