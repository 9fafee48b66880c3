"""Files that commit b923e09 wrote are still read; tests/files/b923e09/README.md says how they were made."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from config import ModelConfig, load_config
from data.corpus import check_meta, read_meta
from model import GPT
from tests.checkpoints import assert_equal, run_in, saved_states
from tests.launcher import Launcher

FILES = Path(__file__).parent / "files/b923e09"
EXPECTED: dict[str, Any] = json.loads((FILES / "expected.json").read_text())

# Save what was loaded, as the checkpoint of step 1, before the first step.
SAVE_FIRST = """
import contextlib, decent
running = decent.Checkpoints.running
@contextlib.contextmanager
def saving(self):
    with running(self):
        self.save(1)
        yield
decent.Checkpoints.running = saving
"""


def write_corpus(folder: Path) -> None:
    """Write the token files on which the runs in FILES were trained."""
    folder.mkdir()
    for split, n_tokens in (("train", 1000), ("val", 300)):
        i = np.arange(n_tokens)
        ((i * i // 7 + i) % 32).astype("<u2").tofile(folder / f"{split}.bin")


@pytest.mark.dist
@pytest.mark.parametrize("case", ["decentdp", "gossip_every", "pytorchddp"])
def test_old_run_directory_resumes_bit_by_bit(launcher: Launcher, tmp_path: Path, case: str) -> None:
    """Inside a window of accum_steps = 4; between two exchanges of gossip_every = 4; with dropout in both others."""
    write_corpus(tmp_path / "data")
    shutil.copytree(FILES / case, tmp_path / "log/run")
    options = (f"data_dir={tmp_path}/data", "log.keep_checkpoints=9")
    config = FILES / case / "config.toml"
    run = run_in(tmp_path / "log", launcher, *options, n=2, config=config, first=SAVE_FIRST)
    assert run.codes == [0, 0], run.errors
    assert any("step-000000006: step 6" in line for line in run.log)

    for now, then in zip(saved_states(run, 1), saved_states(run, 6), strict=True):
        for state in (now, then):
            for group in state.get("parts", {}).get("optimizer", {}).get("param_groups", []):
                del group["lr"]  # of the configuration after a start, of step 6 in the file
        assert_equal(now, then)

    # Equal bits on the machine that wrote the files; another CPU rounds differently.
    for metrics, expected in zip(run.metrics, EXPECTED[case], strict=True):
        assert {key: metrics[key] for key in expected} == pytest.approx(expected, rel=1e-4)


def test_old_best_model_is_read() -> None:
    saved = torch.load(FILES / "decentdp/best_model.pth", weights_only=True)
    gpt = GPT(ModelConfig(**saved["model_config"]), saved["context_length"])
    gpt.load_state_dict(saved["model"])
    tokens = torch.arange(0, 24, 3)[None]
    assert gpt(tokens, tokens + 1)[1].item() == pytest.approx(EXPECTED["best_model_loss"], rel=1e-5)
    assert (saved["step"], saved["val_loss"]) == (5, EXPECTED["decentdp"][0]["val_loss"])


def test_old_config_is_read() -> None:
    cfg = load_config(FILES / "gossip_every/config.toml")
    assert (cfg.train.topology, cfg.train.gossip_every, cfg.train.optim.accum_steps) == ("exp", 4, 4)


def test_old_meta_json_is_read_and_checked(tmp_path: Path) -> None:
    shutil.copy(FILES / "corpus/meta.json", tmp_path)
    for split, n_tokens in (("train", 677), ("val", 18)):
        np.zeros(n_tokens, "<u2").tofile(tmp_path / f"{split}.bin")
    meta = read_meta(tmp_path)
    assert meta is not None
    assert (meta.train.documents, meta.val.tokens, meta.vocab_size) == (39, 18, 50257)
    check_meta(meta, tmp_path, vocab_size=50304)
    with pytest.raises(ValueError, match=r"model.vocab_size = 300 is below the 50257"):
        check_meta(meta, tmp_path, vocab_size=300)
    np.zeros(600, "<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match=r"600 tokens, but .*meta.json says 677"):
        check_meta(meta, tmp_path, vocab_size=50304)
