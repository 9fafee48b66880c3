"""What holds for all tests."""

import signal

# In a background job of a shell it is ignored, and would be by every program that a test starts and stops with it.
signal.signal(signal.SIGINT, signal.default_int_handler)
