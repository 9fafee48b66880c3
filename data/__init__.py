"""Corpora as files of token ids, and the batches that are drawn from them.

The names below load on first use: the prepare scripts import from this package too, and must not wait for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.loader import TokenDataset, prefetch

__all__ = ["TokenDataset", "prefetch"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from data import loader

    return getattr(loader, name)
