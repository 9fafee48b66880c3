"""Files of a checkpoint without any run: written whole or not at all, and refused when damaged or hostile."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from config import Config
from decent import Checkpoints, World
from decent.checkpoint_files import (
    DamagedCheckpoint,
    list_checkpoints,
    publish,
    read_index,
    read_mean,
    read_worker,
    whole_file,
    write_worker,
)

ABOUT: dict[str, Any] = {"backend": "decentdp", "optimizer": "adamw", "model": {}}


def checkpoint(folder: Path, *states: dict[str, Any], step: int = 5) -> Path:
    hidden = folder / ".unfinished"
    return publish(hidden, step, ABOUT, [write_worker(hidden, rank, state) for rank, state in enumerate(states)])


def test_published_checkpoint_is_read_back_and_nothing_else_left(tmp_path: Path) -> None:
    state = {"model": {"w": torch.randn(3)}, "parts": [1, 2.5, "text", None]}
    path = checkpoint(tmp_path, state, state)
    saved = read_index(path)
    assert (saved.step, saved.about, len(saved.workers)) == (5, ABOUT, 2)
    read = read_worker(saved, 1)
    assert torch.equal(read["model"]["w"], state["model"]["w"])
    assert read["parts"] == state["parts"]
    assert list(tmp_path.iterdir()) == [path] == list_checkpoints(tmp_path)
    assert sorted(file.name for file in path.iterdir()) == ["index.json", "worker-00000.pt", "worker-00001.pt"]


def test_checkpoints_are_listed_by_step(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    paths = [checkpoint(run_dir / "checkpoint", {"model": {}}, step=step) for step in (1000, 5, 20)]
    (run_dir / "checkpoint/step-7").mkdir()
    in_order = [paths[1], paths[2], paths[0]]
    assert list_checkpoints(run_dir) == list_checkpoints(run_dir / "checkpoint") == in_order
    assert list_checkpoints(paths[0]) == [paths[0]]
    assert list_checkpoints(tmp_path) == list_checkpoints(tmp_path / "missing") == []


def test_mean_is_over_floating_point_tensors_of_all_workers(tmp_path: Path) -> None:
    states = [{"w": torch.tensor([x, 2 * x]), "n": torch.tensor(i), "text": str(i)} for i, x in enumerate((1.0, 2.5))]
    mean = read_mean(read_index(checkpoint(tmp_path, *states)))
    assert mean["w"].tolist() == [1.75, 3.5]
    assert mean["w"].dtype == torch.float32
    assert (mean["n"].item(), mean["text"]) == (0, "0")


@pytest.mark.parametrize("file", ["worker-00000.pt", "index.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damaged_file_is_refused_by_its_name(tmp_path: Path, file: str, damage: str) -> None:
    path = checkpoint(tmp_path, {"model": {"w": torch.randn(100)}}) / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flipped" else path.read_bytes()[:-10])
    with pytest.raises(DamagedCheckpoint, match=f"{path}: "):
        read_worker(read_index(path.parent), 0)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, {"parts": Evil(tmp_path / "was here")})
    with pytest.raises(DamagedCheckpoint, match="which could run code: not loaded"):
        read_worker(read_index(path), 0)
    assert not (tmp_path / "was here").exists()


def test_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, {}) / "index.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(DamagedCheckpoint, match="has format 3, this program reads 2"):
        read_index(path.parent)


def test_parameters_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nan or infinite"):
        write_worker(tmp_path, 0, {"model": {"w": torch.tensor([1, float("inf")])}})


@pytest.mark.parametrize("rest", [b" it", None])  # None fails the write
def test_file_takes_its_name_only_when_it_is_whole(tmp_path: Path, rest: bytes | None) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with suppress(TypeError), whole_file(path) as file:
        file.write(b"after")
        file.flush()
        assert path.read_bytes() == b"before"
        file.write(rest)  # type: ignore[arg-type]
    assert path.read_bytes() == (b"after it" if rest else b"before")
    assert list(tmp_path.iterdir()) == [path]


def test_construction_touches_neither_files_nor_process_groups(tmp_path: Path) -> None:
    (tmp_path / ".step-000000005").mkdir()
    world = World(rank=0, world_size=2, local_rank=0, local_world_size=2, device=torch.device("cpu"))
    checkpoints = Checkpoints(tmp_path, world, cast(Any, None), {}, Config())  # without init_process_group
    assert checkpoints.wait()  # nothing to wait for
    assert [path.name for path in tmp_path.iterdir()] == [".step-000000005"]
