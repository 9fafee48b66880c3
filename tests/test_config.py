"""config.py: defaults, overrides, round trips, and errors in one line that helps."""

import ast
import functools
import re
import tempfile
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import tomli
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from config import Config, TrainConfig, load_config
from scripts.print_configuration import page

ROOT = Path(__file__).resolve().parents[1]

PAPER = {
    "train": {
        "backend": "decentdp",
        "global_batch_size": 480,
        "context_length": 1024,
        "n_steps": 600_000,
        "grad_norm_clip": 1.0,
        "optim": {"name": "accumadamw", "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1, "accum_steps": 8},
        "lr_schedule": {"name": "cosine", "lr": 6e-4, "warmup_steps": 2000, "eta_min": 6e-5},
    },
    "model": {"n_layers": 12, "n_heads": 12, "n_embd": 768, "dropout": 0.0, "vocab_size": 50304, "bias": False},
}


def load(tmp_path: Path, text: str = "", *overrides: str) -> Config:
    (tmp_path / "c.toml").write_text(text, encoding="utf-8")
    return load_config(tmp_path / "c.toml", list(overrides))


def error(tmp_path: Path, text: str = "", *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller looks at the words
        load(tmp_path, text, *overrides)
    return str(caught.value)


def keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Return all dotted keys, as "train.optim.eps", without the tables."""
    found: list[str] = []
    for name, field in section.model_fields.items():
        if isinstance(kind := field.annotation, type) and issubclass(kind, BaseModel):
            found += keys(kind, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


# --- Errors: one line with the file, the key, the value and what would work ---


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("log_dir = ", ["line 1", "log_dir ="]),
        ('in_memory = true\nlog_dir = "x\n', ["line 2", 'log_dir = "x']),
        ("[train]\nseed = 5\n[train]\n", ["line 3", "[train]"]),
        ("in_memory = yes\n", ["line 1", "in_memory = yes"]),
        ('datset = "sotu"', ["unknown key datset", '"dataset"']),
        ("[train]\nn_step = 5", ["unknown key train.n_step", '"train.n_steps"']),
        ("[train.optim]\nbeta = 1", ["train.optim.beta;", '"train.optim.betas"']),
        ("[trian]\nseed = 5", ["unknown key trian", '"train']),
        ('"a\\nb" = 1', ["unknown key a\\nb"]),
        ('[train]\n"seed\\n" = 1', ["unknown key train.seed\\n", '"train.seed"']),
        ('[train]\nn_steps = "5"', ["train.n_steps", "'5'", "integer"]),
        ("[train]\nn_steps = true", ["train.n_steps", "True", "integer"]),
        ("in_memory = 1", ["in_memory", "1", "boolean"]),
        ('[model]\ndropout = "0"', ["model.dropout", "'0'", "number"]),
        ("log_dir = 5", ["log_dir", "5", "string"]),
        ("train = 5", ["train = 5"]),
        ('[train]\noptim = "adamw"', ["train.optim = 'adamw'"]),
        ("[train.optim]\nbetas = [0.9, 0.9, 0.9]", ["train.optim.betas", "at most 2"]),
        ('[train.optim]\nbetas = ["0.9", 0.9]', ["train.optim.betas.0", "'0.9'", "number"]),
        ("[train]\nn_steps = 0", ["train.n_steps = 0", "equal to 1"]),
        ("[train.optim]\neps = 0.0", ["train.optim.eps = 0.0", "greater than 0"]),
        ("[train.optim]\nbetas = [0.9, 1.0]", ["train.optim.betas.1 = 1.0", "less than 1"]),
        ("[train.lr_schedule]\nlr = inf", ["train.lr_schedule.lr = inf", "finite"]),
        ("[model]\nvocab_size = 65537", ["model.vocab_size = 65537", "65536"]),
        ("[log]\nrun_name = 'a/b'", ["log.run_name", "'a/b'"]),
        ("[log]\nrun_name = '..'", ["log.run_name", "'..'"]),
        ("[train]\ntopology = 'star'", ["train.topology", "'star'", "'ring' or 'alternating-exp-ring'"]),
        ("[model]\nn_embd = 10\nn_heads = 3", ["model.n_embd = 10", "divisible by n_heads = 3"]),
        ("[train]\nn_steps = 2000", ["train.lr_schedule.warmup_steps = 2000", "below n_steps = 2000"]),
        ("[train.lr_schedule]\nlr = 1e-5", ["train.lr_schedule.eta_min = 6e-05", "lr = 1e-05"]),
        ("[train]\ntimeout_s = 0", ["train.timeout_s = 0", "greater than 0"]),
        ("[train]\ntimeout_s = 1e18", ["train.timeout_s = 1e+18", "less than or equal to 1000000"]),
        ("[train]\ngossip_every = 300_001", ["train.gossip_every = 300001", "use at most 300000"]),
        ("[train]\ngossip_every = 2\nbackend = 'pytorchddp'", ["gossip_every = 2 is for", '"decentdp"']),
        ("[train]\ncomm_dtype = 'float16'", ["train.comm_dtype = 'float16'", "'float32' or 'bfloat16'"]),
        ("[train]\ncomm_dtype = 'bfloat16'\nbackend = 'pytorchddp'", ["comm_dtype = bfloat16 is for", "leave it out"]),
        ("[train]\ncomm_dtype = 'bfloat16'\ntopology = 'complete'", ["train.comm_dtype", 'topology = "complete"']),
    ],
)
def test_errors_name_file_key_and_value(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = error(tmp_path, text)
    assert message.startswith(f"{tmp_path / 'c.toml'}: ")
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


def test_errors_count_the_other_mistakes(tmp_path: Path) -> None:
    assert error(tmp_path, "[train]\nn_steps = 0\nseed = -1\n[model]\nbias = 3").endswith(" (and 2 more)")
    for one_mistake in ("[train.optim]\nname = 'sgd'", "dataset = 5", "log_dir = 5"):
        assert "more)" not in error(tmp_path, one_mistake)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.toml: no such configuration file$"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ValueError, match=f"^{tmp_path}: cannot be read: .*Is a directory"):
        load_config(tmp_path)
    (tmp_path / "c.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"c\.toml: cannot be read: 'utf-8' codec"):
        load_config(tmp_path / "c.toml")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.n_steps", ['"train.n_steps"', "key=value"]),
        ("=5", ['"=5"', "key=value"]),
        ("train.n_step=5", ["train.n_step;", '"train.n_steps"']),
        ("train.n_steps=many", ["train.n_steps = 'many'", "integer"]),
        ('train.n_steps="5000"', ["train.n_steps = '5000'", "integer"]),
        ("train=5", ["train = 5"]),
        ("log_dir.x=5", ["log_dir"]),
    ],
)
def test_invalid_overrides_are_refused_in_one_line(tmp_path: Path, override: str, parts: list[str]) -> None:
    message = error(tmp_path, "", override)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


def test_an_override_cannot_enter_a_value_of_the_file(tmp_path: Path) -> None:
    assert error(tmp_path, "train = 5", "train.seed=3") == 'override "train.seed=3": train is a value, not a table'


@given(override=st.text(st.sampled_from("train.seed=3\"'[]{}#\n\\ \t"), max_size=20))
def test_any_refused_override_gives_one_line(override: str) -> None:
    try:
        load_config("/dev/null", [override])
        message = ""
    except ValueError as error:
        message = str(error)
    assert "\n" not in message


# --- Overrides ---


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.n_steps = 5_000", "train.n_steps", 5000),
        ("in_memory=false", "in_memory", False),
        ("log.run_name=3197816", "log.run_name", "3197816"),  # a job id
        ("train.lr_schedule.lr=1e-3", "train.lr_schedule.lr", 1e-3),
        ("train.optim.betas=[0.8, 0.9]", "train.optim.betas", (0.8, 0.9)),
        ("train.topology=ring", "train.topology", "ring"),
        ('train.topology="ring"', "train.topology", "ring"),
        ("log_dir=/some where/a=b", "log_dir", "/some where/a=b"),
    ],
)
def test_overrides_take_toml_values_and_bare_words(tmp_path: Path, override: str, key: str, value: object) -> None:
    assert attrgetter(key)(load(tmp_path, "", override)) == value


def test_the_last_override_wins(tmp_path: Path) -> None:
    text = "[train]\nseed = 1\nn_steps = 7000"
    cfg = load(tmp_path, text, "train.seed=2", "log.eval_steps=9", "train.seed=3")
    assert (cfg.train.seed, cfg.train.n_steps, cfg.log.eval_steps) == (3, 7000, 9)


def test_overrides_are_checked_together_with_the_file(tmp_path: Path) -> None:
    assert "warmup_steps = 2000" in error(tmp_path, "[train]\nn_steps = 3000", "train.n_steps=1000")
    assert load(tmp_path, "[train]\nn_steps = 1000", "train.n_steps=3000").train.n_steps == 3000


# --- Defaults ---


def test_the_defaults_are_those_of_the_paper(tmp_path: Path) -> None:
    defaults = load(tmp_path).model_dump()
    for table, values in PAPER.items():
        assert {key: defaults[table][key] for key in values} == values


def test_configuration_md_is_what_the_script_prints() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == page()


@pytest.mark.parametrize(("name", "betas"), [("adamw", (0.9, 0.95)), ("accumadamw", (0.9, 0.98))])
def test_betas_follow_the_optimizer_unless_given(tmp_path: Path, name: str, betas: tuple[float, float]) -> None:
    assert load(tmp_path, f"[train.optim]\nname = '{name}'").train.optim.betas == betas
    given = load(tmp_path, f"[train.optim]\nname = '{name}'\nbetas = [0.5, 0.6]")
    assert given.train.optim.betas == (0.5, 0.6)


def test_data_dir_follows_dataset_unless_given(tmp_path: Path) -> None:
    assert load(tmp_path, "dataset = 'sotu'").data_dir == "./data/sotu"
    assert load(tmp_path, "dataset = 'sotu'", "data_dir=/elsewhere").data_dir == "/elsewhere"


# --- Paths ---


@pytest.mark.parametrize("key", ["log_dir", "data_dir", "checkpoint"])
def test_only_a_leading_tilde_of_a_path_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert attrgetter(key)(load(tmp_path, f'{key} = "~/x"')) == "/home/me/x"
    assert attrgetter(key)(load(tmp_path, "", f"{key}=~")) == "/home/me"
    assert attrgetter(key)(load(tmp_path, f'{key} = "./~/a~b"')) == "./~/a~b"
    for path in ("$SCRATCH/runs", "/x/${USER}/runs", "~nobody-here/runs"):
        message = error(tmp_path, f'{key} = "{path}"')
        assert message.startswith(f"{tmp_path / 'c.toml'}: {key} = '{path}': ")
        assert "is not expanded" in message or "is not the home of a user" in message
        assert error(tmp_path, "", f"{key}={path}") == message


# --- The loaded configuration ---


paths = st.text(max_size=8).filter(lambda text: "$" not in text and not text.startswith("~"))
names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,8}", fullmatch=True)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "log_dir": paths,
    "data_dir": paths,
    "dataset": names,
    "in_memory": st.booleans(),
    "log.run_name": names,
    "log.eval_interval": st.integers(1, 10**6),
    "train.topology": st.sampled_from(["complete", "exp", "ring", "alternating-exp-ring"]),
    "train.micro_batch_size": st.integers(1, 64),
    "train.grad_norm_clip": st.floats(0, 1e3),
    "train.optim.name": st.sampled_from(["adamw", "accumadamw"]),
    "train.optim.betas": st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=2),
    "train.optim.eps": st.floats(1e-30, 1),
}


@given(values=st.fixed_dictionaries({}, optional=VALUES))
def test_to_toml_reads_back_as_an_equal_configuration(values: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cfg = load(Path(folder), "", *(key + tomli_w.dumps({"": value})[2:] for key, value in values.items()))
        assert load(Path(folder), cfg.to_toml()) == cfg
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    assert {key: attrgetter(key)(cfg) for key in values} == given


def test_to_toml_leaves_out_none_only(tmp_path: Path) -> None:
    cfg, tree = load(tmp_path), tomli.loads(load(tmp_path).to_toml())
    for key in keys(Config):
        *tables, name = key.split(".")
        table = functools.reduce(dict.__getitem__, tables, tree)
        assert (name in table) == (attrgetter(key)(cfg) is not None)


def test_a_configuration_is_immutable(tmp_path: Path) -> None:
    cfg = load(tmp_path)
    for section, key in [(cfg, "log_dir"), (cfg.train, "seed"), (cfg.train.optim, "eps"), (cfg.model, "n_embd")]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, getattr(section, key))


@given(world_size=st.integers(1, 64), micro=st.none() | st.integers(1, 32), batch=st.integers(1, 4096))
def test_micro_batches_divide_the_global_batch(world_size: int, micro: int | None, batch: int) -> None:
    cfg = TrainConfig(global_batch_size=batch, micro_batch_size=micro)
    if batch % (world_size * (micro or 1)):
        with pytest.raises(ValueError, match=rf"^train\.global_batch_size = {batch} .*; (\d+) would be$") as caught:
            cfg.n_micro_batches(world_size)
        batch = int(str(caught.value).split()[-3])
        cfg = TrainConfig(global_batch_size=batch, micro_batch_size=micro)
    assert world_size * (micro or batch // world_size) * cfg.n_micro_batches(world_size) == batch


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.toml")), ids=lambda path: path.name)
def test_shipped_configurations_load_with_and_without_their_options(tmp_path: Path, path: Path) -> None:
    load_config(path)
    load(tmp_path, re.sub(r"(?m)^# (?=\w+ = )", "", path.read_text()))


# What the code calls a section that it is handed; others are read as cfg.<section>.<key>.
HANDED_ON_AS = {"": "cfg", "model": "cfg", "train.optim": "cfg", "train.lr_schedule": "schedule"}


def test_the_code_reads_every_key() -> None:
    folders = [ROOT / folder for folder in ("optim", "decent", "data")]
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    attributes = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)]
    read = {".".join(ast.unparse(node).split(".")[-2:]) for node in attributes}
    unread = set()
    for key in keys(Config):
        section, _, name = key.rpartition(".")
        owners = {section.split(".")[-1], HANDED_ON_AS.get(section), "self" if section == "train" else None}
        if not any(f"{owner}.{name}" in read for owner in owners):
            unread.add(key)
    assert unread == {"train.lr_schedule.name"}  # there is one schedule only
