"""What holds for all tests."""

import os
import signal

from hypothesis import settings

# In a background job of a shell it is ignored, and would be by every program that a test starts and stops with it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A machine that is busy with something else for a moment is no mistake.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

# Servers of tests are on this machine: what a proxy answers is not theirs.
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"
