"""What holds for all tests."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.launcher import SERVER, Launcher

# In a background job of a shell it is ignored, and would be by every program that a test starts and stops with it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A machine that is busy with something else for a moment is no mistake.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

# Servers of tests are on this machine: what a proxy answers is not theirs.
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    command = [sys.executable, "-c", SERVER]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as server:
        yield Launcher(tmp_path_factory.mktemp("train"), server)
