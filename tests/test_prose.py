"""Docstrings begin with a verb or with a noun that names the value."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("data", "decent", "optim", "scripts", "tests")
FILES = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
FIRST_WORDS_TO_AVOID = {"What", "Whether", "Of", "Until", "For", "Where", "Who", "Raises"}


@pytest.mark.parametrize("path", [path.relative_to(ROOT).as_posix() for path in sorted(FILES)])
def test_docstrings_begin_with_a_verb_or_a_noun(path: str) -> None:
    wrong = []
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = (ast.get_docstring(node) or "").split()
            if words and words[0].rstrip(":,") in FIRST_WORDS_TO_AVOID:
                wrong.append(" ".join(words[:8]))
    assert wrong == []
