"""Corpora as files of token ids: how they are prepared, and the batches that are drawn from them."""
