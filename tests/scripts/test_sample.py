"""scripts/sample.py, run as a user does, on a small untrained model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from config import ModelConfig
from model import GPT
from scripts import sample

SCRIPT = Path(sample.__file__)


def run_sample(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=100, check=False)


def save_model(path: Path, vocab_size: int = 50304) -> Path:
    torch.manual_seed(0)
    cfg = ModelConfig(n_layers=1, n_heads=1, n_embd=4, vocab_size=vocab_size)
    model = GPT(cfg, 16)
    with torch.no_grad():
        model.wte.weight[50257:] *= 1e3  # an unmasked sample would nearly always be one of the padding
    saved = {
        "model": model.state_dict(),
        "model_config": cfg.model_dump(),
        "context_length": 16,
        "step": 0,
        "val_loss": 10.8,
    }
    torch.save(saved, path)
    return path


def test_seed_determines_the_continuation_of_the_prompt(tmp_path: Path) -> None:
    path = save_model(tmp_path / "best_model.pth")
    first, again = (run_sample(path, "--prompt", "Fellow", "--tokens", 20, "--top-k", 60000) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("Fellow")
    assert len(first.stdout) > len("Fellow") + 20
    assert first.stdout == again.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "not a best_model.pth of train.py"),
        (b"weights", "not a best_model.pth of train.py"),
        (b"\x80\x02.", "not a best_model.pth of train.py (IndexError: "),  # a pickle of nothing
        ({"model": {}}, "not a best_model.pth of train.py (KeyError: 'model_config')"),
        ({"model": Path()}, "not a best_model.pth of train.py (broken, or more than tensors and numbers)"),
    ],
)
def test_missing_or_broken_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: object, message: str
) -> None:
    path = tmp_path / "best_model.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert sample.main([str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"sample.py: {path}: {message}")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("error", [IndexError("pop from empty list"), AssertionError(), RecursionError("too deep")])
def test_any_error_of_the_unpickler_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def load(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(torch, "load", load)
    assert sample.main([str(tmp_path / "best_model.pth")]) == 2
    assert f"best_model.pth: not a best_model.pth of train.py ({type(error).__name__}" in capsys.readouterr().err


def test_model_of_other_tokens_is_refused(tmp_path: Path) -> None:
    result = run_sample(save_model(tmp_path / "best_model.pth", vocab_size=100))
    assert result.returncode == 2
    assert "vocab_size = 100, but GPT-2's tokens need 50257" in result.stderr


def test_help_does_not_import_torch() -> None:
    code = (
        f"import runpy, sys; sys.argv = ['sample.py', '--help']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 0
    assert "--prompt" in result.stdout
    assert "torch" not in result.stderr
