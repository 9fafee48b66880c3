"""data/placement.py: which documents are validation, and where each goes."""

import math

import datasets
import numpy as np
import pytest

from data.placement import lay_out


@pytest.mark.parametrize("fraction", [0.0005, 0.001, 0.07, 0.1, 1 / 3, 0.5])
@pytest.mark.parametrize("n", [2, 3, 1999, 2000, 2001, 12_345])
def test_split_and_order_are_those_of_datasets(n: int, fraction: float) -> None:
    numbers = datasets.Dataset.from_dict({"i": list(range(n))})
    splits = numbers.train_test_split(test_size=fraction, seed=2357, shuffle=True)
    starts, n_val, n_val_tokens = lay_out(np.ones(n, np.uint32), fraction)  # one token each: the start is the rank
    assert n_val_tokens == n_val == len(splits["test"])
    assert np.argsort(starts).tolist() == [*splits["test"]["i"], *splits["train"]["i"]]


@pytest.mark.parametrize("n", [2, 9, 10, 30, 31, 1000, 50_000])
@pytest.mark.parametrize("longest", [1, 50, 30_000])
def test_validation_holds_20000_tokens_within_bounds(n: int, longest: int) -> None:
    lengths = np.random.default_rng(n).integers(1, longest + 1, n).astype(np.uint32)
    _, n_val, n_val_tokens = lay_out(lengths, None)
    least, most = math.ceil(0.0005 * n), max(1, n // 10)
    shuffled = lengths[np.random.default_rng(2357).permutation(n)]
    fewest = next((i + 1 for i, total in enumerate(np.cumsum(shuffled)) if total >= 20_000), n)
    assert n_val == min(max(fewest, least), most)
    assert n_val_tokens == shuffled[:n_val].sum()


def test_a_fraction_leaves_a_document_to_train_on() -> None:
    with pytest.raises(ValueError, match=r"--val-fraction 0\.9 of 2 documents leaves none to train on"):
        lay_out(np.ones(2, np.uint32), 0.9)
