"""data/encoders.py: gigatoken's ids are tiktoken's, whatever the text."""

import base64
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import encoders
from data.encoders import Gigatoken, Tiktoken, best_encoder, build_encoder, new_letters
from data.tokenizer import _PATTERN, gpt2_encoding

BPETokenizer = pytest.importorskip("gigatoken.gigatoken_rs").BPETokenizer
CODE_POINTS = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]  # without halves of pairs

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


@pytest.fixture(scope="module")
def gigatoken() -> Gigatoken:
    encoder = build_encoder("gigatoken")
    assert isinstance(encoder, Gigatoken)
    return encoder


def test_a_vocabulary_that_16_bits_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiktoken.Encoding, "n_vocab", 2**16 + 1)
    for name in ("tiktoken", "gigatoken"):
        with pytest.raises(ValueError, match=f"{name}: a vocabulary of 65537 tokens does not fit into 16 bits"):
            build_encoder(name)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_has_the_ids_of_encode_ordinary(gigatoken: Gigatoken, name: str) -> None:
    text = HOSTILE[name]
    expected = gpt2_encoding().encode_ordinary(text)
    assert gigatoken(text).tolist() == expected
    assert Tiktoken()(text).tolist() == expected


def test_a_run_of_spaces_on_which_tiktoken_itself_breaks_is_cut_as_its_pattern_would(gigatoken: Gigatoken) -> None:
    for n, end in [(600_000, " x"), (600_000, "\nx"), (600_000, "x")]:  # on these it does not yet
        text = "a" + " " * n + end
        assert Tiktoken()(text).tolist() == gpt2_encoding().encode_ordinary(text)
    text = "a" + " " * 1_100_000 + "x" + "\n" * 1_100_000 + "y "
    assert Tiktoken()(text).tolist() == gigatoken(text).tolist()


@settings(max_examples=300)
@given(st.text())
@example("\u0c5c's")
def test_any_text_has_the_ids_of_encode_ordinary(gigatoken: Gigatoken, text: str) -> None:
    assert gigatoken(text).tolist() == gpt2_encoding().encode_ordinary(text)


def test_new_letters_are_exactly_those_that_the_two_take_differently(tmp_path: Path) -> None:
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
    ours = tiktoken.Encoding("probe", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={})

    def differ(codes: list[int]) -> bool:
        text = "".join(f"\n{chr(code)}a\n{chr(code)}1\n{chr(code)}!" for code in codes)
        return not np.array_equal(ours.encode_to_numpy(text), theirs.encode(text.encode("utf-8")))

    blocks = [CODE_POINTS[i : i + 2048] for i in range(0, len(CODE_POINTS), 2048)]
    found = [code for block in blocks if differ(block) for code in block if differ([code])]
    assert found == [code for first, last in new_letters() for code in range(ord(first), ord(last) + 1)]
    assert len(found) == 4657


def test_every_new_letter_sends_its_document_to_tiktoken(gigatoken: Gigatoken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gigatoken, "tiktoken", lambda text: "tiktoken")
    letters = [chr(code) for first, last in new_letters() for code in range(ord(first), ord(last) + 1)]
    assert {str(gigatoken(f"é{letter}")) for letter in letters} == {"tiktoken"}
    assert str(gigatoken("é 한 👩")) != "tiktoken"


def test_versions_whose_differences_are_unknown_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert best_encoder() == "gigatoken"
    monkeypatch.setitem(encoders.VERSIONS, "gigatoken", "0.9.0")
    assert best_encoder() == "tiktoken"
    with pytest.raises(ValueError, match=r"needs gigatoken 0\.9\.0 .* found gigatoken 0\.10\.0 .*--tokenizer tiktoken"):
        build_encoder("gigatoken")
