"""data/loader.py: the laws of batches, one memory per node, and the thread that makes batches ahead."""

import io
import itertools
import multiprocessing
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loguru import logger

from data import TokenDataset, prefetch
from data.loader import Load, Split, TokenError, _draw, widen
from data.node_memory import MemoryFile
from data.token_file import write_tokens

N_TOKENS = {"train": 5000, "val": 700}
linux = pytest.mark.skipif(sys.platform != "linux", reason="memfd_create and /proc are Linux's")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files in which every token is its own position, so that a window tells where it starts."""
    folder = tmp_path_factory.mktemp("corpus")
    for split, n in N_TOKENS.items():
        write_tokens(folder / f"{split}.bin", [np.arange(n)])
    return folder


seeds = st.integers(0, 2**63 - 1)
steps = st.integers(0, 2**40)
splits = st.sampled_from(["train", "val"])


@given(splits, seeds, steps, st.integers(1, 64), st.booleans())
def test_a_batch_is_a_pure_function_of_seed_stream_and_step(
    data_dir: Path, split: Split, seed: int, step: int, context_length: int, evaluation: bool
) -> None:
    first, second = (TokenDataset(data_dir, context_length, seed) for _ in range(2))
    for other in range(3):
        second.batch("train", other, slice(0, 2), 4)  # what was drawn before does not matter
    for a, b in zip(
        first.batch(split, step, slice(0, 6), 6, evaluation=evaluation),
        second.batch(split, step, slice(0, 6), 6, evaluation=evaluation),
        strict=True,
    ):
        assert torch.equal(a, b)


@given(splits, seeds, steps, st.integers(1, 8), st.integers(1, 5), st.integers(1, 64))
def test_the_rows_of_all_workers_are_the_global_batch(
    data_dir: Path, split: Split, seed: int, step: int, world_size: int, per_worker: int, context_length: int
) -> None:
    dataset = TokenDataset(data_dir, context_length, seed)
    n = world_size * per_worker
    rows = [slice(rank * per_worker, (rank + 1) * per_worker) for rank in range(world_size)]
    parts = [dataset.batch(split, step, r, n) for r in rows]
    for whole, of_workers in zip(dataset.batch(split, step, slice(0, n), n), zip(*parts, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(of_workers))


@given(splits, seeds, steps, st.integers(1, 64))
def test_targets_are_the_inputs_one_token_later(
    data_dir: Path, split: Split, seed: int, step: int, context_length: int
) -> None:
    x, y = TokenDataset(data_dir, context_length, seed).batch(split, step, slice(1, 4), 5)
    assert x.shape == y.shape == (3, context_length)
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous()
    assert y.is_contiguous()
    assert torch.equal(y[:, :-1], x[:, 1:])
    assert torch.equal(x, x[:, :1] + torch.arange(context_length))  # consecutive tokens of the file
    assert torch.equal(y, x + 1)


def test_a_batch_is_its_windows_widened(data_dir: Path) -> None:
    dataset = TokenDataset(data_dir, 8, 42)
    windows = dataset.windows("train", 3, slice(1, 4), 5)
    assert windows.shape == (3, 9)
    assert windows.dtype == torch.uint16
    for widened, expected in zip(widen(windows), dataset.batch("train", 3, slice(1, 4), 5), strict=True):
        assert torch.equal(widened, expected)


def test_widening_keeps_all_ids_of_16_bits() -> None:
    ids = torch.arange(2**16)
    x, y = widen(ids.to(torch.uint16).view(2, -1))
    assert torch.equal(x, ids.view(2, -1)[:, :-1])
    assert torch.equal(y, ids.view(2, -1)[:, 1:])


@given(splits, st.integers(1, 699), st.integers(1, 9))
def test_in_order_every_token_but_the_first_is_a_target_once(
    data_dir: Path, split: Split, context_length: int, n: int
) -> None:
    dataset = TokenDataset(data_dir, context_length, 42)
    n_targets = dataset.n_targets(split)
    assert n_targets == N_TOKENS[split] - 1
    n_windows = -(-n_targets // context_length)
    parts = [widen(dataset.windows_in_order(split, first, n)) for first in range(0, n_windows, n)]
    x, y = (torch.cat(column).flatten() for column in zip(*parts, strict=True))
    assert torch.equal(x[:n_targets], torch.arange(n_targets))
    assert torch.equal(y[:n_targets], torch.arange(n_targets) + 1)
    assert not y[n_targets:].any()


def test_streams_steps_and_seeds_differ(data_dir: Path) -> None:
    drawn = []
    for seed, step in itertools.product([0, 1, 2, 2**62], [0, 1, 2, 2**32]):
        dataset = TokenDataset(data_dir, 8, seed)
        batch = [dataset.batch("train", step, slice(0, 32), 32, evaluation=e)[0] for e in (False, True)]
        drawn += [*batch, dataset.batch("val", step, slice(0, 32), 32, evaluation=True)[0]]
    for a, b in itertools.combinations(drawn, 2):
        assert (a[:, 0] == b[:, 0]).sum() < 8  # of 32; by chance at most a few among 692 or more starts


def test_validation_has_one_stream(data_dir: Path) -> None:
    dataset = TokenDataset(data_dir, 8, 42)
    for a, b in zip(*(dataset.batch("val", 3, slice(0, 4), 4, evaluation=e) for e in (False, True)), strict=True):
        assert torch.equal(a, b)


def test_every_legal_window_is_drawn_equally_often(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_tokens(tmp_path / f"{split}.bin", [np.arange(11)])
    dataset = TokenDataset(tmp_path, 4, 42)
    n_starts, n_draws = 7, 70_000  # starts 0 ... 6: the last window ends with the file
    starts = [int(s) for step in range(70) for s in dataset.batch("train", step, slice(0, 1000), 1000)[0][:, 0]]
    counts = Counter(starts)
    assert sorted(counts) == list(range(n_starts))
    # chi-square with 6 degrees of freedom is above 27.9 once in 10,000 seeds; this one is fixed
    assert sum((count - n_draws / n_starts) ** 2 / (n_draws / n_starts) for count in counts.values()) < 27.9


def test_a_file_of_one_window_is_enough(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_tokens(tmp_path / f"{split}.bin", [np.arange(5)])
    x, y = TokenDataset(tmp_path, 4, 42).batch("val", 9, slice(0, 3), 3)
    assert x.tolist() == [[0, 1, 2, 3]] * 3
    assert y.tolist() == [[1, 2, 3, 4]] * 3


def test_draws_stay_the_same_in_all_versions() -> None:
    # else a resumed run would continue with other batches; the numbers are what the first version drew
    assert _draw(42, 0, 1000, 4, slice(4), n=9_035_581_465).tolist() == [8645637869, 8181742209, 1576001976, 4513495193]


def test_a_token_id_beyond_the_vocabulary_is_found_when_opening(data_dir: Path) -> None:
    TokenDataset(data_dir, 8, 42, vocab_size=5000)
    message = rf"{data_dir}/train.bin: holds token id 4999, but model.vocab_size = 4999 .* at least 5000"
    with pytest.raises(ValueError, match=message):
        TokenDataset(data_dir, 8, 42, vocab_size=4999)
    with pytest.raises(ValueError, match=r"train.bin: holds token id 4999, but model.vocab_size = 699 "):
        TokenDataset(data_dir, 8, 42, vocab_size=699)


def test_a_token_id_beyond_the_scan_is_found_in_its_batch(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.loader._SCAN_TOKENS", 10)
    dataset = TokenDataset(data_dir, 8, 42, vocab_size=100)
    with pytest.raises(ValueError, match=r"val.bin: holds token id \d+, but model.vocab_size = 100 "):
        dataset.batch("val", 0, slice(0, 16), 16)


def test_a_file_that_is_cut_while_it_is_read_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_tokens(tmp_path / f"{split}.bin", [np.zeros(50_000, np.uint16)])
    dataset = TokenDataset(tmp_path, 8, 42)
    os.truncate(tmp_path / "train.bin", 2000)
    message = r"train.bin: held 50000 tokens when training started, and holds 1000 now"
    with pytest.raises(TokenError, match=message):
        dataset.batch("train", 0, slice(0, 16), 16)
    with pytest.raises(TokenError, match=message):
        dataset.windows_in_order("train", 0, 4)
    dataset.batch("val", 0, slice(0, 16), 16)


@linux
def test_resident_memory_and_descriptors_do_not_grow_over_10_000_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_mb, file_mb = 16, 200
    monkeypatch.setattr("data.loader._MAPPED_BYTES", limit_mb * 2**20)
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").touch()
        os.truncate(tmp_path / f"{split}.bin", file_mb * 2**20)
    dataset = TokenDataset(tmp_path, 1024, 42)
    for path in dataset.paths.values():
        path.unlink()  # a batch that opened its file again would not find it
    dataset.batch("train", 0, slice(0, 30), 30)
    before_mb, n_open = _resident_mb(), len(os.listdir("/proc/self/fd"))
    largest_mb = dict(before_mb)
    for step in range(10_000):
        dataset.batch("train", step, slice(0, 30), 30)
        if step % 50 == 0:
            largest_mb = {kind: max(mb, largest_mb[kind]) for kind, mb in _resident_mb().items()}
    assert largest_mb["RssAnon"] - before_mb["RssAnon"] < 8  # buffers that malloc keeps
    assert largest_mb["RssFile"] - before_mb["RssFile"] < 2 * limit_mb  # the kernel maps around a page
    assert len(os.listdir("/proc/self/fd")) == n_open


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_missing_or_short_file_of_either_split_is_found_when_opening(
    tmp_path: Path, split: str, in_memory: bool
) -> None:
    for name in {"train", "val"} - {split}:
        write_tokens(tmp_path / f"{name}.bin", [np.arange(9)])
    with pytest.raises(ValueError, match=rf"{split}\.bin: no such file"):
        TokenDataset(tmp_path, 8, 42, in_memory)
    write_tokens(tmp_path / f"{split}.bin", [np.arange(8)])
    with pytest.raises(ValueError, match=rf"{split}\.bin: holds 8 tokens"):
        TokenDataset(tmp_path, 8, 42, in_memory)


@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=linux)])
def test_in_memory_gives_the_batches_of_the_files(data_dir: Path, shared: bool) -> None:
    mapped = TokenDataset(data_dir, 16, 42)
    in_memory = TokenDataset(data_dir, 16, 42, in_memory=True, share=_alone if shared else None)
    assert not any(tokens.flags.writeable for tokens in in_memory.tokens.values())
    for split in ("train", "val"):
        for a, b in zip(*(d.batch(split, 7, slice(0, 9), 9) for d in (mapped, in_memory)), strict=True):
            assert torch.equal(a, b)


@linux
def test_two_processes_hold_one_memory_which_outlives_its_maker(data_dir: Path) -> None:
    places: list[MemoryFile] = []

    def share(load: Load | None) -> MemoryFile:
        assert load is not None
        places.append(load())
        return places[-1]

    maker = TokenDataset(data_dir, 16, 42, in_memory=True, local_rank=0, share=share)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    worker = context.Process(target=_other_worker, args=(there, data_dir, places), daemon=True)
    worker.start()
    there.close()
    assert here.recv() == "mapped"
    assert worker.pid is not None
    ours, theirs = _memory_inodes(os.getpid()), _memory_inodes(worker.pid)
    assert ours == theirs == {place.inode for place in places}
    assert len(ours) == 2  # train and val
    expected = maker.batch("train", 3, slice(4, 8), 8)[0].tolist()
    del maker
    assert not _memory_inodes(os.getpid())
    here.send("go on")
    assert here.recv() == expected
    worker.join(20)
    assert worker.exitcode == 0
    with closing(here):
        worker.close()


@linux
def test_one_worker_of_a_node_tells_of_loading_and_shows_its_progress(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.node_memory._TELL_BYTES", 1)
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # no thread, which would outlive the test
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    told: list[str] = []
    places: list[MemoryFile] = []
    turns = itertools.count()

    def share(load: Load | None) -> MemoryFile:
        if load is not None:
            places.append(load())
        return places[next(turns) % 2]  # train, val, for one worker after the other

    sink = logger.add(told.append, format="{message}")
    try:
        workers = [TokenDataset(data_dir, 16, 42, True, local_rank=rank, share=share) for rank in range(2)]
    finally:
        logger.remove(sink)
    expected = [f"{verb} {path}" for path in workers[0].paths.values() for verb in ("Loading", "Loaded")]
    assert [line.split(",")[0].split(" in ")[0] for line in told] == expected
    assert [terminal.getvalue().count(f"{split}.bin:   0%") for split in ("train", "val")] == [1, 1]


@linux
def test_a_memory_that_cannot_be_opened_is_an_error_that_says_what_to_do(data_dir: Path) -> None:
    for wrong in (MemoryFile(os.getpid(), 9999, 1), MemoryFile(os.getpid(), 0, -1)):
        with pytest.raises(ValueError, match=r"in_memory = true: .* set in_memory = false"):
            TokenDataset(data_dir, 16, 42, in_memory=True, local_rank=1, share=lambda _, wrong=wrong: wrong)


@linux
def test_dropped_datasets_leave_no_descriptor_open(data_dir: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for in_memory, share in [(False, None), (True, None), (True, _alone)]:
        TokenDataset(data_dir, 16, 42, in_memory, share=share).batch("train", 0, slice(0, 1), 1)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("first_step", "n_steps"), [(0, 20), (17, 20), (19, 20), (20, 20), (25, 20)])
def test_prefetch_yields_the_batches_of_all_steps_in_order(data_dir: Path, first_step: int, n_steps: int) -> None:
    dataset = TokenDataset(data_dir, 8, 42)
    batches = list(
        prefetch(lambda step: dataset.windows("train", step, slice(2, 4), 6), first_step, n_steps, device="cpu")
    )
    assert len(batches) == max(0, n_steps - first_step)
    for step, (x, y) in enumerate(batches, first_step):
        expected_x, expected_y = dataset.batch("train", step, slice(2, 4), 6)
        assert torch.equal(x, expected_x)
        assert torch.equal(y, expected_y)
    assert not _prefetch_threads()


def test_prefetch_makes_two_batches_ahead_and_no_more() -> None:
    made: list[int] = []
    with closing(prefetch(lambda step: _numbered(made, step), 0, 100, device="cpu")) as batches:
        for step in range(5):
            next(batches)
            _wait_until(lambda step=step: len(made) == step + 3)
            time.sleep(0.02)
            assert made == list(range(step + 3))


def test_prefetch_raises_an_error_at_its_step() -> None:
    def windows_of(step: int) -> torch.Tensor:
        if step == 3:
            raise ValueError("train.bin is torn")
        return _numbered([], step)

    batches = prefetch(windows_of, 0, 10, device="cpu")
    assert [int(next(batches)[0]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"train\.bin is torn"):
        next(batches)
    assert not _prefetch_threads()


def test_leaving_prefetch_early_ends_its_thread() -> None:
    made: list[int] = []
    batches = prefetch(lambda step: _numbered(made, step), 0, 10**9, device="cpu")
    next(batches)
    assert len(_prefetch_threads()) == 1
    batches.close()
    assert not _prefetch_threads()

    for x, _ in prefetch(lambda step: _numbered(made, step), 0, 10**9, device="cpu"):
        if x == 2:
            break
    assert not _prefetch_threads()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_prefetch_delivers_on_the_gpu(data_dir: Path) -> None:
    dataset = TokenDataset(data_dir, 8, 42)
    batches = prefetch(lambda step: dataset.windows("train", step, slice(0, 4), 4), 0, 50, device="cuda:0")
    for step, (x, y) in enumerate(batches):
        assert x.device == y.device == torch.device("cuda:0")
        assert torch.equal(x.cpu(), dataset.batch("train", step, slice(0, 4), 4)[0])
        assert torch.equal(y.cpu(), dataset.batch("train", step, slice(0, 4), 4)[1])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _alone(load: Load | None) -> MemoryFile:
    assert load is not None
    return load()


def _other_worker(pipe: Connection, data_dir: Path, places: list[MemoryFile]) -> None:
    from_maker: Iterator[MemoryFile] = iter(places)
    dataset = TokenDataset(data_dir, 16, 42, in_memory=True, local_rank=1, share=lambda _: next(from_maker))
    pipe.send("mapped")
    pipe.recv()
    pipe.send(dataset.batch("train", 3, slice(4, 8), 8)[0].tolist())


def _memory_inodes(pid: int) -> set[int]:
    """Inodes of the memory files of corpora that a process maps."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return {int(inode) for inode in re.findall(r"(\d+) +/memfd:\w+\.bin", maps)}


def _resident_mb() -> dict[str, float]:
    """Of this process, by kind: RssAnon, RssFile (mapped files), RssShmem."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Rss")}


def _numbered(made: list[int], step: int) -> torch.Tensor:
    """One window of two tokens, the first of which is the step."""
    made.append(step)
    return torch.tensor([[step, 0]], dtype=torch.uint16)


def _prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
