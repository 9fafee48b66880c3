"""Prepares a corpus as nanoGPT does, for `bench.py prepare` to compare with.

    python -m scripts.benchmarks.nanogpt a.jsonl b.jsonl --out out/

A Hugging Face data set is split, mapped to lists of ids in two processes, and written to memory-mapped files in 1,024
shards.
"""

import argparse
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
from tqdm import tqdm

from data.tokenizer import gpt2_encoding

NUM_PROC = 2
N_SHARDS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", help=".jsonl or .parquet files with a column text")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    kind = "parquet" if args.texts[0].endswith(".parquet") else "json"
    dataset = cast(datasets.Dataset, datasets.load_dataset(kind, data_files=args.texts, split="train"))
    splits = dataset.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    splits["val"] = splits.pop("test")
    tokenized = splits.map(to_ids, remove_columns=["text"], desc="tokenizing", num_proc=NUM_PROC)
    for split, documents in tokenized.items():
        write(documents, args.out / f"{split}.bin")


def to_ids(example: dict[str, str]) -> dict[str, Any]:
    encoding = gpt2_encoding()
    ids = [*encoding.encode_ordinary(example["text"]), encoding.eot_token]
    return {"ids": ids, "len": len(ids)}


def write(documents: datasets.Dataset, path: Path) -> None:
    n_tokens = int(np.sum(documents["len"], dtype=np.uint64))
    array = np.memmap(path, dtype=np.uint16, mode="w+", shape=(n_tokens,))
    n_shards = min(N_SHARDS, len(documents))  # val may have fewer documents; an empty shard cannot be concatenated
    start = 0
    for index in tqdm(range(n_shards), desc=f"writing {path}"):
        batch = documents.shard(num_shards=n_shards, index=index, contiguous=True).with_format("numpy")
        ids = np.concatenate(cast(Any, batch["ids"]))
        array[start : start + len(ids)] = ids
        start += len(ids)
    array.flush()


if __name__ == "__main__":
    main()
