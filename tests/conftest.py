"""Settings and fixtures of all tests."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.launcher import SERVER, Launcher

# In a background job of a shell SIGINT is ignored. Programs that a test stops with it would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A slow example is no mistake: the machine may be busy for a moment.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

# Servers of tests run on this machine, where no proxy must answer for them.
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Starts train.py in workers that fork from one server."""
    command = [sys.executable, "-c", SERVER]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as server:
        yield Launcher(tmp_path_factory.mktemp("train"), server)
