"""The progress bar of a preparation: what is done, tokens per second, and how long it still takes."""

import sys
import time
from typing import Any


class Progress:
    """A bar on stderr, as a context. It appears with the first `add`, for tqdm takes a while to import.

    total: all there is to do, in units: bytes ("B") or documents.
    """

    def __init__(self, name: str, total: int, unit: str = "B") -> None:
        self.name = name
        self.total = total
        self.unit = unit
        self.n_tokens = 0
        self.start_s = time.monotonic()
        self.bar: Any = None  # a tqdm

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def add(self, n: int, n_tokens: int) -> None:
        if self.bar is None:
            from tqdm import tqdm

            tqdm.monitor_interval = 0  # no thread: processes are forked after this
            rare_s = 0.1 if sys.stderr.isatty() else 10  # in a log file each is a line
            self.bar = tqdm(
                total=self.total, desc=self.name, unit=self.unit, unit_scale=True, delay=rare_s, mininterval=rare_s
            )
        self.n_tokens += n_tokens
        speed = self.n_tokens / max(1e-9, time.monotonic() - self.start_s)
        self.bar.set_postfix_str(f"{speed / 1e6:.2f}M tokens/s", refresh=False)
        self.bar.update(min(n, self.total - self.bar.n))
