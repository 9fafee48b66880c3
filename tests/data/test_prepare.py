"""data/prepare.py and the command lines: documents to a data folder, whatever is killed, broken or missing."""

import errno
import fcntl
import gzip
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import placement, tokenizer
from data import prepare as passes
from data.corpus import check_meta, file_sha256, read_meta
from data.documents import local_files
from data.openwebtext import prepare as openwebtext
from data.prepare import Job, is_prepared
from data.sotu import prepare as sotu
from data.tokenizer import gpt2_encoding

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["the", "<|endoftext|>", "Décentralisé", "한국", "\n\n", "1,024", "👩‍👧", "gossip", "don't", "\u0c5c's"]
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12 on fork beside threads


def texts(n: int, *, longest: int = 40) -> list[str]:
    random = np.random.default_rng(2357)
    return [" ".join(random.choice(WORDS, size)) for size in random.integers(0, longest, n)]


def jsonl(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def many_files(folder: Path, rows: list[str], n: int = 7) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(n):
        jsonl(folder / f"{i}.jsonl", rows[len(rows) * i // n : len(rows) * (i + 1) // n])
    return folder


def nanogpt(rows: list[str], fraction: float = 0.0005) -> dict[str, bytes]:
    """Return what nanoGPT's data/openwebtext/prepare.py stores, by a plain loop over datasets' own split."""
    encoding = gpt2_encoding()
    splits = datasets.Dataset.from_dict({"text": rows}).train_test_split(test_size=fraction, seed=2357, shuffle=True)

    def stored(split: str) -> bytes:
        ids = (token for text in splits[split]["text"] for token in [*encoding.encode_ordinary(text), 50256])
        return np.fromiter(ids, dtype="<u2").tobytes()

    return {"train": stored("train"), "val": stored("test")}


def prepared(out: Path) -> dict[str, bytes]:
    return {split: (out / f"{split}.bin").read_bytes() for split in ("train", "val")}


def decode(data: bytes) -> str:
    return gpt2_encoding().decode(np.frombuffer(data, "<u2").tolist())


def job(path: Path, **options: Any) -> Job:
    options = {"gigatoken": tokenizer.gigatoken_is_tested(), "num_proc": 2, "val_fraction": 0.0005, **options}
    return Job(local_files([str(path)], "text"), **options)


def prepare(path: Path, out: Path, **options: Any) -> None:
    passes.prepare(job(path, **options), out)


def run(*args: object, corpus: str = "openwebtext", returncode: int = 0, **options: Any) -> str:
    command = [sys.executable, str(ROOT / "data" / corpus / "prepare.py"), *map(str, args)]
    options = {"cwd": "/", **options}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=100, **options)
    assert done.returncode == returncode, done.stderr
    assert returncode == 0 or len(done.stderr.splitlines()) == 1 or "usage:" in done.stderr, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_PART_BYTES", 1)
    monkeypatch.setattr(placement, "_BLOCK", 17)


@pytest.mark.parametrize(("gigatoken", "num_proc", "fraction"), [(True, 1, 0.0005), (True, 3, 0.2), (False, 2, 0.0005)])
@pytest.mark.usefixtures("small_parts")
def test_files_are_byte_for_byte_nanogpts(tmp_path: Path, gigatoken: bool, num_proc: int, fraction: float) -> None:
    rows = [*texts(1200), "long " * 5000, *texts(1200)]
    options = {"gigatoken": gigatoken, "num_proc": num_proc, "val_fraction": fraction}
    prepare(many_files(tmp_path / "in", rows), tmp_path / "out", **options)
    assert prepared(tmp_path / "out") == nanogpt(rows, fraction)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    rows = texts(300)
    paths = [tmp_path / f"a{suffix}" for suffix in (".jsonl", ".jsonl.gz", ".parquet")]
    jsonl(paths[0], rows)
    paths[1].write_bytes(gzip.compress(paths[0].read_bytes()))
    pq.write_table(pa.table({"text": rows}), paths[2], row_group_size=70)
    (tmp_path / "texts").mkdir()
    for i, row in enumerate(rows):
        (tmp_path / "texts" / f"{i:03}.txt").write_bytes(row.encode())
    for path in [*paths, tmp_path / "texts"]:
        prepare(path, tmp_path / "out" / path.name)
        assert prepared(tmp_path / "out" / path.name) == nanogpt(rows)


@pytest.mark.parametrize("fraction", [None, 0.25])
def test_a_single_text_is_cut_at_a_line(tmp_path: Path, fraction: float | None) -> None:
    text = "".join(f"Zeile {i} für 한국\n" for i in range(5000))
    (tmp_path / "a.txt").write_text(text)
    prepare(tmp_path / "a.txt", tmp_path / "out", val_fraction=fraction)
    data = prepared(tmp_path / "out")
    train, val = (decode(data[split]).removesuffix("<|endoftext|>") for split in ("train", "val"))
    assert train + val == text
    assert train.endswith("\n")
    n = len(gpt2_encoding().encode_ordinary(text))
    wanted = n // 10 if fraction is None else math.ceil(0.25 * n)
    n_val = len(gpt2_encoding().encode_ordinary(val))
    assert wanted <= n_val < wanted + 20  # a line has fewer
    (tmp_path / "a.txt").write_text("no line break")
    with pytest.raises(ValueError, match=r"a\.txt: no line begins before its last"):
        prepare(tmp_path / "a.txt", tmp_path / "new", val_fraction=fraction)


@pytest.mark.parametrize("num_proc", [1, 3])
@pytest.mark.usefixtures("small_parts")
def test_nothing_behind_a_limit_counts(tmp_path: Path, num_proc: int) -> None:
    rows, out = texts(300), tmp_path / "out"
    folder = many_files(tmp_path / "in", rows)
    for limit in (2, 50, 5000):
        prepare(folder, out, num_proc=num_proc, limit=limit)
        assert prepared(out) == nanogpt(rows[:limit])
    with open(folder / "1.jsonl", "a") as file:  # behind 85 documents
        file.write("broken\n")
    prepare(folder, out, num_proc=num_proc, limit=85)
    assert prepared(out) == nanogpt(rows[:85])
    with pytest.raises(ValueError, match=r"1\.jsonl, line 44: is not JSON .*--skip-bad"):
        prepare(folder, out, num_proc=num_proc, limit=86)
    prepare(folder, out, num_proc=num_proc, limit=86, skip_bad=True)
    assert prepared(out) == nanogpt(rows[:86])
    meta = read_meta(out)
    assert meta is not None
    assert "1 document could not be read and had to be skipped; the first: " in meta.left_out


def test_meta_json_tells_counts_hashes_and_share(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", texts(50))
    output = run("--input", "*.jsonl", "--out", "mine", cwd=tmp_path)
    meta, file = read_meta(tmp_path / "mine"), tmp_path / "mine" / "train.bin"
    assert meta is not None
    assert (meta.source, meta.tokenizer, meta.vocab_size, meta.val_fraction) == ("*.jsonl", "gpt2", 50257, None)
    assert (meta.train.documents, meta.val.documents) == (45, 5)
    assert f"val.bin: 5 documents, {meta.val.tokens} tokens" in output
    check_meta(meta, tmp_path / "mine", vocab_size=50257)
    assert meta.train.sha256 == file_sha256(file)
    assert meta.train.sha256 in output
    before = file.stat().st_ino
    assert "there already" in run("--input", "*.jsonl", "--out", "mine", cwd=tmp_path)
    assert file.stat().st_ino == before


def test_a_changed_corpus_is_prepared_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = jsonl(tmp_path / "a.jsonl", texts(20)), tmp_path / "out"
    prepare(path, out)
    jsonl(path, texts(30))
    assert not is_prepared(job(path), out)
    prepare(path, out)
    assert prepared(out) == nanogpt(texts(30))
    monkeypatch.setattr(passes, "tokenise", lambda *_: (os.utime(path, (0, 0)), ([], 0, ""))[1])
    with pytest.raises(ValueError, match=r"a\.jsonl: changed while it was read"):
        prepare(path, out, limit=9)


def test_folders_of_older_versions_stay(tmp_path: Path) -> None:
    path, out = jsonl(tmp_path / "a.jsonl", texts(20)), tmp_path / "out"
    prepare(path, out)
    status = os.stat(path)
    older = hashlib.sha256(repr("text").encode() + repr((str(path), status.st_size, status.st_mtime_ns)).encode())
    fields = json.loads((out / "meta.json").read_text())
    assert fields.pop("val_fraction") == 0.0005
    (out / "meta.json").write_text(json.dumps(fields))
    assert fields["source_fingerprint"] == older.hexdigest()
    assert is_prepared(job(path, val_fraction=None), out)
    assert is_prepared(job(path), out)
    assert not is_prepared(job(path, val_fraction=0.1), out)


def test_another_fraction_prepares_the_folder_again(tmp_path: Path) -> None:
    path, out = jsonl(tmp_path / "a.jsonl", texts(50)), tmp_path / "out"
    for fraction in (None, 0.1, 0.3):
        assert not is_prepared(job(path, val_fraction=fraction), out)
        prepare(path, out, val_fraction=fraction)
        assert is_prepared(job(path, val_fraction=fraction), out)
        assert is_prepared(job(path, val_fraction=None), out)
    assert prepared(out) == nanogpt(texts(50), 0.3)


class Killed(BaseException):
    """Stands for the end of the process."""


def killed(*_: object) -> None:
    raise Killed


def prepare_until(step: str, path: Path, out: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, step, killed)
        with pytest.raises(Killed):
            prepare(path, out)


@pytest.mark.usefixtures("small_parts")
def test_whole_parts_are_not_made_again(tmp_path: Path) -> None:
    rows, out = texts(700), tmp_path / "out"
    folder = many_files(tmp_path / "in", rows)
    prepare_until("sync_and_hash", folder, out)
    parts = sorted(out.glob(".prepare/*/*.tokens"))
    os.truncate(parts[5], 10)  # as after a power failure
    parts[6].with_suffix(".npz").write_bytes(bytes(100))
    before = [path.stat().st_mtime_ns for path in parts]
    prepare_until("place", folder, out)
    after = [path.stat().st_mtime_ns for path in parts]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True] * 5 + [False] * 2
    prepare(folder, out)
    assert prepared(out) == nanogpt(rows)
    assert sorted(file.name for file in out.iterdir()) == ["meta.json", "train.bin", "val.bin"]


@pytest.mark.usefixtures("small_parts")
def test_parts_of_another_job_are_not_used(tmp_path: Path) -> None:
    rows, out = texts(70), tmp_path / "out"
    prepare_until("place", many_files(tmp_path / "in", rows), out)
    prepare(many_files(tmp_path / "in", rows[::-1]), out)
    assert prepared(out) == nanogpt(rows[::-1])


def test_a_second_run_at_the_same_place_is_refused(tmp_path: Path) -> None:
    path, spool = jsonl(tmp_path / "a.jsonl", texts(9)), tmp_path / "out" / ".prepare"
    (spool / "job").mkdir(parents=True)  # a first run has just started
    with open(spool / "lock", "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        assert "out: another process is preparing a corpus here" in run(
            "--input", path, "--out", tmp_path / "out", returncode=2
        )
    assert sorted(path.name for path in spool.iterdir()) == ["job", "lock"]


def test_a_file_system_without_locks_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    prepare(jsonl(tmp_path / "a.jsonl", texts(9)), tmp_path / "out")
    assert "no locks on this file system (No locks available)" in capsys.readouterr().out
    assert prepared(tmp_path / "out") == nanogpt(texts(9))


def session(leader: int) -> set[int]:
    """The processes of a session that run."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own = stat.read_text().rsplit(")", 1)[1].split()[:4]
        except OSError:
            continue
        if int(own) == leader and state != "Z":
            found.add(int(stat.parent.name))
    return found


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.fault
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, "child"])
def test_a_killed_run_leaves_no_process_and_is_resumed(tmp_path: Path, how: signal.Signals | str) -> None:
    rows, out = texts(1000, longest=200) * 9, tmp_path / "out"
    folder = many_files(tmp_path / "in", rows, 3)  # a part each
    command = ["--input", folder, "--out", out, "--num-proc", 2, "--tokenizer", "tiktoken", "--val-fraction", 0.0005]
    script = [sys.executable, str(ROOT / "data" / "openwebtext" / "prepare.py"), *map(str, command)]
    process = subprocess.Popen(script, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_until(lambda: list(out.glob(".prepare/*/*.npz")) or process.poll() is not None)
    children = session(process.pid) - {process.pid}
    assert children
    os.kill(min(children) if how == "child" else process.pid, signal.SIGKILL if isinstance(how, str) else how)
    _, error = process.communicate(timeout=60)
    wait_until(lambda: not session(process.pid))
    if how != signal.SIGKILL:
        assert process.returncode == (2 if how == "child" else 130)
        assert "Traceback" not in error
        assert ("a process was killed, perhaps for want of memory" if how == "child" else "stopped; the same") in error
    assert [path.name for path in out.iterdir()] == [".prepare"]
    run(*command)
    prepare(folder, tmp_path / "again")
    assert prepared(out) == prepared(tmp_path / "again")


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("*.jsonl", None, "*.jsonl: matches no file"),
        ("a.jsonl", b'{"text": "alone"}', "holds 1 document, but train and val need one each"),
        ("b.txt", b"caf\xe9", "b.txt: is not UTF-8 (byte 3); --skip"),
    ],
    ids=range(3),
)
def test_bad_input_is_one_line_and_leaves_older_files(
    tmp_path: Path, name: str, data: bytes | None, reason: str
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    out = tmp_path / "out"
    out.mkdir()
    (out / "train.bin").write_bytes(b"old")
    for folder in (out, tmp_path / "new" / "folder"):
        assert reason in run("--input", tmp_path / name, "--out", folder, returncode=2)
    assert [(path.name, path.read_bytes()) for path in out.iterdir() if path.is_file()] == [("train.bin", b"old")]


def test_skip_bad_counts_and_says_the_first(tmp_path: Path) -> None:
    rows, out = texts(9), tmp_path / "out"
    path = jsonl(tmp_path / "a.jsonl", rows)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], lines[4][:-3], *lines[5:], '{"text": null}', "[]"]))
    options = ("--input", path, "--out", out, "--val-fraction", 0.0005)
    output = run(*options, "--skip-bad")
    assert f"3 documents could not be read and had to be skipped; the first: {path}, line 5: is not JSON" in output
    assert prepared(out) == nanogpt(rows[:4] + rows[5:])
    assert read_meta(out).documents_left_out == 3  # pyright: ignore[reportOptionalMemberAccess]
    assert "there already" in run(*options, "--skip-bad")
    error = run(*options, returncode=2)
    assert "line 5: is not JSON" in error


def test_a_wrong_encoder_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first document of a part is compared, of a long one the beginning."""
    encode = tokenizer.gigatoken_encoder()
    monkeypatch.setattr(
        passes, "gigatoken_encoder", lambda: lambda text: encode(text) + 1 if len(text) > 1000 else encode(text)
    )
    rows = ["word " * 100_000, *texts(9)]
    with pytest.raises(ValueError, match="gives other ids than tiktoken for the document that begins 'word word"):
        prepare(jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.bin"))


@pytest.mark.fault
def test_names_that_are_not_utf_8_are_printed(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.jsonl")
    jsonl(tmp_path / name, texts(9))
    run("--input", name, "--out", os.fsdecode(b"out\xff"), cwd=tmp_path)
    meta = read_meta(os.fsdecode(os.fsencode(tmp_path) + b"/out\xff"))
    assert meta is not None
    assert meta.source == "\\udcff.jsonl"


@pytest.mark.fault
@pytest.mark.skipif(os.geteuid() != 0, reason="gives up the rights of root")
def test_a_folder_without_permission_is_one_line(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", texts(9))
    (tmp_path / "other").mkdir(mode=0o700)
    os.chown(tmp_path / "other", 12345, 12345)
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable]
    script = [*drop, str(ROOT / "data" / "openwebtext" / "prepare.py"), "--input", "a.jsonl", "--out", "other/o"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "Permission denied" in done.stderr


@pytest.mark.fault
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system: needs root")
def test_a_full_disk_is_one_line_and_is_resumed(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        rows = texts(10_000)
        command = ("--input", jsonl(tmp_path / "a.jsonl", rows), "--out", disk / "out", "--val-fraction", 0.0005)
        assert "No space left on device" in run(*command, returncode=2)
        assert not list(disk.glob("out/*.bin"))
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        run(*command)
        assert prepared(disk / "out") == nanogpt(rows)
    finally:
        subprocess.run(["umount", disk], check=True)


def fill_cache(home: Path, n: int = 80) -> dict[str, str]:
    """Return the environment in which a cache of the hub holds the first n parquet files, of one document each."""
    name, config, revision = openwebtext.OPENWEBTEXT
    folder = home / "hub" / ("datasets--" + name.replace("/", "--")) / "snapshots" / revision / config
    folder.mkdir(parents=True)
    for i in range(n):
        pq.write_table(pa.table({"text": [f"file {i}"]}), folder / f"train-{i:05}-of-00080.parquet")
    return os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}


def test_openwebtext_comes_from_the_cache_in_order(tmp_path: Path) -> None:
    run("--out", tmp_path / "out", env=fill_cache(tmp_path))
    data = prepared(tmp_path / "out")
    order = np.random.default_rng(2357).permutation(80)
    assert decode(data["val"] + data["train"]) == "".join(f"file {i}<|endoftext|>" for i in order)


def test_a_cache_that_lacks_files_is_refused(tmp_path: Path) -> None:
    error = run("--out", tmp_path / "out", env=fill_cache(tmp_path, 3), returncode=2)
    assert "the cache has 3 of 80 .parquet files" in error
    assert "--input" in error


@pytest.mark.parametrize("offline", ["0", "1"])
def test_without_a_network_alternatives_are_named_soon(tmp_path: Path, offline: str) -> None:
    environment = os.environ | {
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": offline,
    }
    start_s = time.monotonic()
    error = run("--out", tmp_path / "out", env=environment, returncode=2)
    assert time.monotonic() - start_s < 60
    for alternative in ("--input", "copy train.bin", "HF_ENDPOINT", "HF_HOME", "data/sotu/prepare.py"):
        assert alternative in error
    assert not (tmp_path / "out").exists()


def test_openwebtext_is_there_with_its_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--out", str(tmp_path)])
    monkeypatch.setattr(openwebtext, "N_TOKENS", {"train": 100, "val": 10})
    monkeypatch.setattr(openwebtext, "open_corpus", killed)
    (tmp_path / "train.bin").write_bytes(bytes(200))
    (tmp_path / "val.bin").write_bytes(bytes(20))
    assert openwebtext.main() == 0
    (tmp_path / "val.bin").write_bytes(bytes(18))
    with pytest.raises(Killed):
        openwebtext.main()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--num-proc", "abc"), "argument --num-proc: invalid int value: 'abc'"),
        (("--limit", "0"), "--num-proc and --limit: give a number above 0"),
        (("--val-fraction", "1"), "--val-fraction: give a number between 0 and 1"),
        (("--input", "a.txt"), "need --out"),
        (("--hub", "a/b", "--input", "a.txt", "--out", "o"), "give one of them"),
        (("--revision", "main"), "need --hub"),
    ],
    ids=range(6),
)
def test_a_wrong_option_is_refused(options: tuple[str, ...], reason: str) -> None:
    assert reason in run(*options, returncode=2)


def imports(script: str, *args: str, **options: Any) -> set[str]:
    command = [sys.executable, "-X", "importtime", str(ROOT / "data" / script), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=True, **options)
    return {line.rsplit("|")[-1].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize(
    ("command", "present", "absent"),
    [
        ("sotu/prepare.py --help", "argparse", "tiktoken"),
        ("openwebtext/prepare.py --help", "argparse", "tiktoken"),
        ("openwebtext/prepare.py --input a.jsonl --out out", "tiktoken", "datasets"),
    ],
)
def test_nothing_large_is_imported_in_vain(tmp_path: Path, command: str, present: str, absent: str) -> None:
    jsonl(tmp_path / "a.jsonl", texts(9))
    script, *args = command.split()
    python = [sys.executable, "-X", "importtime", str(ROOT / "data" / script), *args]
    done = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True, check=True)
    imported = {line.rsplit("|")[-1].strip() for line in done.stderr.splitlines()}
    assert present in imported
    assert not imported & {absent, "torch", "datasets", "pyarrow", "huggingface_hub"}


@pytest.fixture(scope="module")
def sotu_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sotu") / "not" / "there"
    sotu.prepare(out)
    return out


def test_sotu_is_as_described_and_decodes_to_the_addresses(sotu_dir: Path) -> None:
    meta = read_meta(sotu_dir)
    assert meta is not None
    check_meta(meta, sotu_dir, vocab_size=50257)
    assert (meta.train.documents, meta.val.documents) == (237, 12)
    assert {"train": meta.train.tokens, "val": meta.val.tokens} == sotu.N_TOKENS
    for split, addresses in sotu.read_addresses().items():
        assert decode(prepared(sotu_dir)[split]).split("<|endoftext|>") == [*addresses, ""]


def test_sotu_validation_is_unseen_in_training() -> None:
    addresses = sotu.read_addresses()
    assert len(set(addresses["train"]) | set(addresses["val"])) == 249
    train, val = (" ".join(" ".join(addresses[split]).split()) for split in ("train", "val"))
    words = val.split()
    samples = [" ".join(words[i : i + 20]) for i in range(0, len(words), 200)]
    # Andrew Johnson repeats in 1868 what he said the year before
    assert sum(sample in train for sample in samples) / len(samples) < 0.02


def test_sotu_repairs_files_that_are_cut(sotu_dir: Path) -> None:
    before = os.stat(sotu_dir / "train.bin").st_ino
    assert "there already" in run("--out", sotu_dir, corpus="sotu")
    assert os.stat(sotu_dir / "train.bin").st_ino == before
    os.truncate(sotu_dir / "val.bin", 100)
    assert "127,418 tokens" in run("--out", sotu_dir, corpus="sotu")
