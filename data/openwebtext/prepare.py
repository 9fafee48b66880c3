"""Makes train.bin and val.bin of OpenWebText: python data/openwebtext/prepare.py --num-proc 16

Does nothing when both files are there already. Needs the Hugging Face hub, or its cache with HF_HUB_OFFLINE=1.
"""

import argparse
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.token_file import Tokens, is_complete, write_tokens

if TYPE_CHECKING:
    import datasets

# The parquet revision of the data set that nanoGPT loads as "openwebtext" (a script, which datasets 4 no longer runs).
DATASET = "Skylion007/openwebtext"
CONFIG = "plain_text"
REVISION = "79d93d786212f7344586290adb811d4ae6a1762c"
N_TOKENS = {"train": 9_035_582_489, "val": 4_434_606}

BATCH = 1000  # documents in memory at once, per process

ALTERNATIVES = (
    "run this script on a machine with a network and copy train.bin and val.bin here; or set HF_ENDPOINT to a mirror "
    "of the hub; or set HF_HOME to a cache that holds the data set, with HF_HUB_OFFLINE=1; or train on the small "
    "corpus of data/sotu/prepare.py"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="folder of the two files")
    parser.add_argument("--num-proc", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    args = parser.parse_args()
    if all(is_complete(args.out / f"{split}.bin", n) for split, n in N_TOKENS.items()):
        print(f"{args.out}: train.bin and val.bin are there already")
        return 0
    try:
        check_sources()
        prepare(download(num_proc=args.num_proc), args.out, num_proc=args.num_proc)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def check_sources() -> None:
    """Fails now, in a minute at most, where the download would fail late: datasets retries long, and the merges are
    needed only after it.

    Raises:
        ValueError: the hub does not answer, or GPT-2's merges cannot be had.
    """
    from huggingface_hub import constants

    from data.tokenizer import gpt2_encoding

    if not constants.HF_HUB_OFFLINE:
        _ask(constants.ENDPOINT)
    gpt2_encoding()


def download(*, num_proc: int) -> "datasets.Dataset":
    """The 8,013,769 documents, from the hub or its cache.

    Raises:
        ValueError: the hub went out of reach, or the data set is not in the cache while HF_HUB_OFFLINE is set.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(DATASET, CONFIG, revision=REVISION, split="train", num_proc=num_proc)
    except (ConnectionError, FileNotFoundError) as error:
        raise ValueError(f"{DATASET} cannot be loaded ({error}): {ALTERNATIVES}") from None
    assert isinstance(dataset, datasets.Dataset)
    return dataset


def prepare(dataset: "datasets.Dataset", out: Path, *, num_proc: int) -> None:
    """Writes out/train.bin and out/val.bin of a data set with a column "text", split and tokenised as nanoGPT does.

    Raises:
        ValueError: GPT-2's merges cannot be had.
    """
    from data.tokenizer import gpt2_encoding

    gpt2_encoding()  # before the processes start: they inherit it, or find the merges in data/.cache
    out.mkdir(parents=True, exist_ok=True)
    splits = dataset.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    for split, documents in [("val", splits["test"]), ("train", splits["train"])]:
        n_tokens = write_tokens(out / f"{split}.bin", _token_arrays(split, documents, num_proc))
        print(f"{out / split}.bin: {len(documents):,} documents, {n_tokens:,} tokens")


def _token_arrays(split: str, documents: "datasets.Dataset", num_proc: int) -> Iterator[Tokens]:
    """One array a document, in order. `map` keeps them on disk (in the cache of datasets), not in memory."""
    import datasets
    from tqdm import tqdm

    tokenized = documents.map(
        _encode_batch,
        batched=True,
        batch_size=BATCH,
        remove_columns=documents.column_names,
        features=datasets.Features({"ids": datasets.List(datasets.Value("uint16"))}),
        num_proc=num_proc,
        desc=f"tokenizing {split}",
    )
    with tqdm(total=len(tokenized), desc=f"writing {split}", unit=" documents") as progress:
        for batch in tokenized.with_format("numpy").iter(batch_size=BATCH):
            arrays = cast(dict[str, Any], batch)["ids"]
            yield from arrays
            progress.update(len(arrays))


def _encode_batch(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
    from data.tokenizer import encode_document, gpt2_encoding

    return {"ids": [encode_document(gpt2_encoding(), text) for text in batch["text"]]}


def _ask(endpoint: str) -> None:
    """Any answer will do, an error of HTTP as well."""
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError as error:
        error.close()
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"{endpoint} cannot be reached ({reason}): {ALTERNATIVES}") from None


if __name__ == "__main__":
    sys.exit(main())
