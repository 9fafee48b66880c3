"""data/files.py: which files a user means."""

import os
import re
from pathlib import Path

import pytest

from data.files import find_files, user_path


def test_files_are_in_order_of_folder_and_name(tmp_path: Path) -> None:
    names = ["a/b.txt", "a/c.txt", "a-b.txt", "a.txt", "b/a.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_files([f"{tmp_path}/*.txt", f"{tmp_path}/**/*.txt"])[0] == tuple(str(tmp_path / name) for name in names)
    assert find_files([str(tmp_path)])[0] == tuple(str(tmp_path / name) for name in names)


def test_every_real_file_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "texts" / "2024"
    folder.mkdir(parents=True)
    for name in "ab":
        (folder / f"{name}.txt").touch()
    os.link(folder / "a.txt", folder / "hard link.txt")
    (folder / "link.txt").symlink_to("b.txt")
    (folder / "broken.txt").symlink_to("nowhere")
    (tmp_path / "texts" / "latest").symlink_to("2024")
    for loop in ("self", "again"):  # a walk without memory would take 2^40 steps
        (folder / loop).symlink_to(".")
    (folder / "up").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    spellings = ["texts/2024/*.txt", "./texts/../texts/2024/a.txt", f"{folder}/b.txt", "texts/latest/*", "texts", "**"]
    for pattern in spellings[:1] + spellings[3:]:
        assert len(find_files([pattern])[0]) == 2
    assert len(find_files(spellings)[0]) == 2


def test_links_to_other_folders_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.txt").touch()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "link").symlink_to(tmp_path / "disk")
    assert find_files([f"{tmp_path}/texts/**/*.txt"])[0] == (f"{tmp_path}/texts/link/a.txt",)


def test_home_is_expanded_and_variables_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").touch()
    assert find_files(["~/*.txt"])[0] == (f"{tmp_path}/a.txt",)
    assert user_path("~/x", "--out") == f"{tmp_path}/x"
    for name in ("$DATA", "${DATA}"):
        with pytest.raises(ValueError, match=rf"--input {re.escape(name)}/x\.txt: {re.escape(name)} is not expanded"):
            find_files([f"{name}/x.txt"])
