"""Import rules, read from the source. Imports point one way: train.py to config, model, optim, decent, data."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = {"config", "data", "decent", "model", "optim", "train"}
DISTRIBUTED = {"world", "liveness", "stop", "exchange", "decent_dp", "allreduce_dp", "checkpoint"}  # modules of decent/
INSTRUMENTS = ("scripts/bench", "scripts/lab/", "scripts/netlab")  # they time bare collectives and other wrappers


def sources(*patterns: str) -> list[str]:
    """Return the paths of matching Python files from the root, e.g. "decent/topology.py"."""
    found = sorted({path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)})
    assert found
    return found


MODULES = sources("*.py", "data/**/*.py", "decent/**/*.py", "optim/**/*.py", "scripts/**/*.py")


@cache
def read(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def nodes_of(tree: ast.AST, *, typing_too: bool) -> Iterator[ast.AST]:
    """Yield all nodes, also inside functions; without typing_too, not those under `if TYPE_CHECKING:`."""
    yield tree
    for field, child in ast.iter_fields(tree):
        for_typing = isinstance(tree, ast.If) and field == "body" and "TYPE_CHECKING" in ast.unparse(tree.test)
        if for_typing and not typing_too:
            continue
        for node in child if isinstance(child, list) else [child]:
            if isinstance(node, ast.AST):
                yield from nodes_of(node, typing_too=typing_too)


def imports(tree: ast.AST, *, typing_too: bool = True) -> set[str]:
    """Return the dotted names of all imports: "torch", "torch.distributed", "decent.exchange.Exchange"."""
    found: set[str] = set()
    for node in nodes_of(tree, typing_too=typing_too):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def packages(tree: ast.AST, *, typing_too: bool = True) -> set[str]:
    return {name.split(".")[0] for name in imports(tree, typing_too=typing_too)}


def mentions(tree: ast.AST, name: str) -> bool:
    """Return whether a dotted name is imported, or written as an attribute, whatever alias hides it."""
    names = imports(tree) | {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return any(f"{other}.".startswith(f"{name}.") for other in names)


def test_reader_sees_every_way_to_import() -> None:
    ways = ["import torch.distributed as dist", "from torch import distributed", "torch.distributed.barrier()"]
    for line in [*ways, "from torch.distributed import all_reduce", "def f():\n    import torch.distributed"]:
        assert mentions(ast.parse(line), "torch.distributed")
    assert not mentions(ast.parse("from torch import nn; torch.distributions"), "torch.distributed")
    tree = ast.parse("import os\nif TYPE_CHECKING:\n    from config import Config\nelse:\n    import late")
    assert packages(tree) == {"os", "config", "late"}
    assert packages(tree, typing_too=False) == {"os", "late"}


def test_top_level_has_three_modules() -> None:
    assert sources("*.py") == ["config.py", "model.py", "train.py"]
    assert not (ROOT / "config" / "__init__.py").exists(), "it would shadow config.py"


def test_only_decent_uses_torch_distributed() -> None:
    allowed = {f"decent/{name}.py" for name in DISTRIBUTED}
    others = [path for path in MODULES if path not in allowed and not path.startswith(INSTRUMENTS)]
    assert [path for path in others if mentions(read(path), "torch.distributed")] == []


def test_only_world_reads_the_environment() -> None:
    names = ("os.environ", "os.environb", "os.getenv", "os.putenv")
    others = [path for path in MODULES if path != "decent/world.py" and not path.startswith("scripts/")]
    assert [path for path in others if any(mentions(read(path), name) for name in names)] == []


def test_decent_optim_and_model_know_only_types_of_config() -> None:
    for path in sources("decent/**/*.py", "optim/**/*.py", "model.py"):
        assert packages(read(path)) & PROJECT <= {path.split("/")[0], "config"}, path
        assert "config" not in packages(read(path), typing_too=False), path


def test_data_knows_only_itself() -> None:
    assert [path for path in sources("data/**/*.py") if not packages(read(path)) & PROJECT <= {"data"}] == []


def test_pure_modules_import_no_torch() -> None:
    assert packages(read("config.py")) & PROJECT == set()
    pure = sources("config.py", "decent/topology.py", "data/token_file.py", "data/corpus.py")
    assert [path for path in pure if "torch" in packages(read(path))] == []


def test_wandb_is_imported_only_where_it_is_used() -> None:
    """Its import takes a second, which runs that do not report there need not wait."""
    at_start = [statement for path in MODULES for statement in read(path).body]
    assert not any("wandb" in packages(s) for s in at_start if isinstance(s, ast.Import | ast.ImportFrom))


def test_nothing_imports_the_entry_point() -> None:
    assert [path for path in MODULES if path != "train.py" and "train" in packages(read(path))] == []


def test_torch_load_runs_no_code_of_the_file() -> None:
    for path in [*MODULES, *sources("tests/**/*.py")]:
        assert "torch.load" not in imports(read(path)), "write torch.load, so that this test sees it"
        calls = [node for node in ast.walk(read(path)) if isinstance(node, ast.Call)]
        for call in calls:
            if isinstance(call.func, ast.Attribute) and ast.unparse(call.func) == "torch.load":
                assert {k.arg: ast.unparse(k.value) for k in call.keywords}.get("weights_only") == "True", path
