"""Who may import what, read from the source. Imports point one way: train.py to config, model, optim, decent, data."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTED = {
    f"decent/{name}.py" for name in ("world", "liveness", "exchange", "decent_dp", "allreduce_dp", "checkpoint")
}
BENCHMARKS = {
    f"scripts/{name}.py" for name in ("benchmarks/exchange", "benchmarks/loader", "benchmarks/workers", "lab/worker")
}  # time the bare collectives and other wrappers

PROJECT = {"config", "data", "decent", "evaluation", "model", "optim", "report", "train"}


def sources(*patterns: str) -> list[str]:
    """Paths from the root of the Python files that match, e.g. "decent/topology.py"."""
    found = sorted({path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)})
    assert found
    return found


MODULES = sources("*.py", "data/**/*.py", "decent/**/*.py", "optim/**/*.py", "scripts/**/*.py")


def read(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def nodes_of(tree: ast.AST, *, typing_too: bool) -> Iterator[ast.AST]:
    """All nodes, those of functions as well; without typing_too, not what stands under `if TYPE_CHECKING:`."""
    yield tree
    for field, child in ast.iter_fields(tree):
        if (
            isinstance(tree, ast.If)
            and field == "body"
            and not typing_too
            and "TYPE_CHECKING" in ast.unparse(tree.test)
        ):
            continue
        for node in child if isinstance(child, list) else [child]:
            if isinstance(node, ast.AST):
                yield from nodes_of(node, typing_too=typing_too)


def imports(tree: ast.AST, *, typing_too: bool = True) -> set[str]:
    """Dotted names of what is imported: "torch", "torch.distributed", "os.environ", "decent.exchange.Exchange"."""
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
    """Whether a dotted name is imported, or written as an attribute, also of an alias: dist and os do not hide it."""
    dotted = imports(tree) | {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return any(f"{other}.".startswith(f"{name}.") for other in dotted)


def test_the_reader_sees_every_way_to_import() -> None:
    source = """
import torch.distributed as dist
from torch import distributed
from torch.distributed import all_reduce
import os
os.environ["RANK"]
if TYPE_CHECKING:
    from config import Config
else:
    import late
def f():
    import data.loader
"""
    tree = ast.parse(source)
    assert packages(tree) == {"torch", "os", "config", "data", "late"}
    assert packages(tree, typing_too=False) == {"torch", "os", "data", "late"}
    assert mentions(tree, "os.environ")
    for line in source.splitlines()[1:4]:
        assert mentions(ast.parse(line), "torch.distributed")
    assert mentions(ast.parse("torch.distributed.barrier()"), "torch.distributed")
    assert not mentions(ast.parse("from torch import nn; torch.distributions"), "torch.distributed")


@pytest.mark.parametrize("path", MODULES)
def test_torch_distributed_is_used_in_the_modules_made_for_it_only(path: str) -> None:
    assert path in DISTRIBUTED | BENCHMARKS or not mentions(read(path), "torch.distributed")


@pytest.mark.parametrize("path", [path for path in MODULES if not path.startswith("scripts/")])
def test_only_world_reads_the_environment(path: str) -> None:
    tree = read(path)
    reads = [name for name in ("os.environ", "os.environb", "os.getenv", "os.putenv") if mentions(tree, name)]
    assert path == "decent/world.py" or not reads


@pytest.mark.parametrize("path", sources("decent/**/*.py", "optim/**/*.py"))
def test_decent_and_optim_know_no_model_and_no_data_and_of_config_only_types(path: str) -> None:
    tree = read(path)
    assert packages(tree) & PROJECT <= {path.split("/")[0], "config"}
    assert "config" not in packages(tree, typing_too=False)


def test_decent_and_optim_do_not_know_each_other() -> None:
    assert not any("optim" in packages(read(path)) for path in sources("decent/**/*.py"))
    assert not any("decent" in packages(read(path)) for path in sources("optim/**/*.py"))


def test_model_imports_nothing_of_the_project_but_the_type_of_its_configuration() -> None:
    assert packages(read("model.py")) & PROJECT <= {"config"}
    assert packages(read("model.py"), typing_too=False) & PROJECT == set()


@pytest.mark.parametrize("path", sources("data/**/*.py"))
def test_data_imports_only_itself_of_the_project(path: str) -> None:
    assert packages(read(path)) & PROJECT <= {"data"}


def test_config_imports_nothing_of_the_project_and_no_torch() -> None:
    assert packages(read("config.py")) & (PROJECT | {"torch"}) == set()


@pytest.mark.parametrize("path", ["decent/topology.py", "data/token_file.py"])
def test_what_is_pure_imports_no_torch(path: str) -> None:
    assert "torch" not in packages(read(path))


@pytest.mark.parametrize("path", [path for path in MODULES if path != "train.py"])
def test_nothing_imports_the_entry_point(path: str) -> None:
    assert "train" not in packages(read(path))


def test_the_folder_of_configurations_does_not_shadow_the_module() -> None:
    assert not (ROOT / "config" / "__init__.py").exists()


@pytest.mark.parametrize("path", [*MODULES, *sources("tests/**/*.py")])
def test_torch_load_runs_no_code_of_the_file(path: str) -> None:
    tree = read(path)
    assert "torch.load" not in imports(tree), "write torch.load, so that this test sees it"
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"]
    safe = {"weights_only": "True"}
    assert all(safe.items() <= {k.arg: ast.unparse(k.value) for k in call.keywords}.items() for call in calls)
