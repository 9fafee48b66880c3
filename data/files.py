"""Files that a user means: by their names, as folders or by patterns, each real file once."""

import glob
import hashlib
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")


def find_files(patterns: list[str]) -> tuple[tuple[str, ...], Sequence[int]]:
    """Return the files that match, sorted by folder and name, each once by whatever names, and their sizes in bytes.

    A pattern is a file, a folder (all files of known kinds below it), or has *, ?, [...] and ** as in a shell.

    Raises:
        ValueError: a pattern matches nothing, or a file of an unknown kind.
    """
    found: dict[tuple[int, int], str] = {}  # by device and inode
    for pattern in patterns:
        path = user_path(pattern, "--input")
        in_folder = os.path.isdir(path)
        expanded = [path] if os.path.isfile(path) else _expand(f"{glob.escape(path)}/**" if in_folder else path)
        names = [name for name in expanded if os.path.isfile(name) and (name.endswith(SUFFIXES) or not in_folder)]
        if not names:
            raise ValueError(f"--input {pattern}: matches no file" + " of a known kind below it" * in_folder)
        for name in sorted((str(Path(name)) for name in names), key=_by_folder):
            if not name.endswith(SUFFIXES):
                raise ValueError(f"{name}: does not end in one of {', '.join(SUFFIXES)}")
            status = os.stat(name)
            found.setdefault((status.st_dev, status.st_ino), name)
    files = tuple(sorted(found.values(), key=_by_folder))
    return files, array("q", map(os.path.getsize, files))


def user_path(text: str, option: str) -> str:
    """Return a path or pattern as the user meant it: ~ is the home folder.

    Raises:
        ValueError: it holds $NAME, which only a shell expands.
    """
    if os.path.exists(text):
        return text
    if match := re.search(r"\$\w+|\$\{\w+\}", text):
        raise ValueError(
            f"{option} {text}: {match[0]} is not expanded; write the path itself, or do not quote it in '...'"
        )
    return os.path.expanduser(text)


def _expand(pattern: str) -> Iterator[str]:
    """Yield what matches, as glob does, but enter each real folder once: links may lead round in circles."""
    parts = pattern.split("/")
    if "**" not in parts:
        yield from glob.iglob(pattern)
        return
    at = parts.index("**")
    top, rest = "/".join(parts[:at]), "/".join(parts[at + 1 :]) or "*"
    seen: set[tuple[int, int]] = set()
    for start in sorted(glob.iglob(top or ("/" if at else "."))):
        for folder, folders, _ in os.walk(start, followlinks=True):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield from _expand(os.path.join(glob.escape(folder), rest))


def _by_folder(path: str) -> str:
    return "\0".join(Path(path).parts)  # the files of a folder are together


def file_fingerprint(files: Sequence[str], identity: str) -> str:
    """Return a hash that changes when a file does, by name, size or time."""
    digest = hashlib.sha256(repr(identity).encode())
    for path in files:
        status = os.stat(path)
        digest.update(repr((path, status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()


def printable(text: str) -> str:
    """Return a text that any output takes: names of files need not be UTF-8."""
    return text.encode(errors="backslashreplace").decode()
