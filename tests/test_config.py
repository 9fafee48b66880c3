"""config.py: what a configuration may say, and that whatever is wrong with one is told in one line that helps."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from config import Config, TrainConfig, load_config

ROOT = Path(__file__).resolve().parents[1]

# As the table in README.md has them, with the optimizer's betas for its default name.
DEFAULTS = {
    "log_dir": "./log",
    "dataset": "openwebtext",
    "data_dir": "./data/openwebtext",
    "in_memory": True,
    "log.wandb_log": True,
    "log.wandb_project": "gpt2-owt",
    "log.eval_interval": 1000,
    "log.eval_steps": 200,
    "log.eval_full": False,
    "log.checkpoint_interval": None,  # that of evaluations
    "log.keep_checkpoints": 2,
    "log.run_name": None,  # SLURM's job id, or the time
    "checkpoint": "",
    "train.backend": "decentdp",
    "train.topology": None,
    "train.comm_dtype": "float32",
    "train.gossip_every": 1,
    "train.stop_on_nan": True,
    "train.timeout_s": 600.0,
    "train.seed": 42,
    "train.global_batch_size": 480,
    "train.micro_batch_size": None,  # a worker's whole share
    "train.context_length": 1024,
    "train.n_steps": 600_000,
    "train.grad_norm_clip": 1.0,
    "train.compile": True,
    "train.amp": True,
    "train.optim.name": "accumadamw",
    "train.optim.betas": (0.9, 0.98),
    "train.optim.eps": 1e-8,
    "train.optim.weight_decay": 0.1,
    "train.optim.accum_steps": 8,
    "train.lr_schedule.name": "cosine",
    "train.lr_schedule.lr": 6e-4,
    "train.lr_schedule.warmup_steps": 2000,
    "train.lr_schedule.eta_min": 6e-5,
    "model.n_layers": 12,
    "model.n_heads": 12,
    "model.n_embd": 768,
    "model.dropout": 0.0,
    "model.vocab_size": 50304,
    "model.bias": False,
}


def load(tmp_path: Path, text: str = "", *overrides: str) -> Config:
    (tmp_path / "c.toml").write_text(text, encoding="utf-8")
    return load_config(tmp_path / "c.toml", list(overrides))


def error(tmp_path: Path, text: str = "", *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller looks at the words
        load(tmp_path, text, *overrides)
    return str(caught.value)


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train.optim.eps": 1e-8, ...}: the values of a tree of tables by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


# --- What is wrong is told in one line that names the file, the key, the value and what would work ---


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        pytest.param("log_dir = ", ["line 1", "log_dir ="], id="no value"),
        pytest.param('in_memory = true\nlog_dir = "x\n', ["line 2", 'log_dir = "x'], id="open string"),
        pytest.param("[train]\nseed = 5\n[train]\n", ["line 3", "[train]"], id="table twice"),
        pytest.param("in_memory = yes\n", ["line 1", "in_memory = yes"], id="unquoted"),
        pytest.param('datset = "sotu"', ["unknown key datset", '"dataset"'], id="unknown key"),
        pytest.param("[train]\nn_step = 5", ["unknown key train.n_step", '"train.n_steps"'], id="unknown nested key"),
        pytest.param("[train.optim]\nbeta = 1", ["train.optim.beta;", '"train.optim.betas"'], id="unknown deep key"),
        pytest.param("[trian]\nseed = 5", ["unknown key trian", '"train'], id="unknown table"),
        pytest.param('[train]\nn_steps = "5"', ["train.n_steps", "'5'", "integer"], id="string for an int"),
        pytest.param("[train]\nn_steps = true", ["train.n_steps", "True", "integer"], id="bool for an int"),
        pytest.param("[train]\nn_steps = 5e3", ["train.n_steps", "5000.0", "integer"], id="float for an int"),
        pytest.param("in_memory = 1", ["in_memory", "1", "boolean"], id="int for a bool"),
        pytest.param('[train]\namp = "yes"', ["train.amp", "'yes'", "boolean"], id="string for a bool"),
        pytest.param('[model]\ndropout = "0"', ["model.dropout", "'0'", "number"], id="string for a float"),
        pytest.param("log_dir = 5", ["log_dir", "5", "string"], id="int for a string"),
        pytest.param("train = 5", ["train = 5"], id="int for a table"),
        pytest.param('[train]\noptim = "adamw"', ["train.optim = 'adamw'"], id="string for a table"),
        pytest.param("[log_dir]\nx = 1", ["log_dir", "{'x': 1}", "string"], id="table for a value"),
        pytest.param("[train.optim]\nbetas = 0.9", ["train.optim.betas", "0.9"], id="one beta"),
        pytest.param("[train.optim]\nbetas = [0.9]", ["train.optim.betas"], id="list of one beta"),
        pytest.param("[train.optim]\nbetas = [0.9, 0.9, 0.9]", ["train.optim.betas", "at most 2"], id="three betas"),
        pytest.param('[train.optim]\nbetas = ["0.9", 0.9]', ["train.optim.betas.0", "'0.9'", "number"], id="text beta"),
        pytest.param("[train]\nn_steps = 0", ["train.n_steps = 0", "equal to 1"], id="no steps"),
        pytest.param("[train]\nseed = -1", ["train.seed = -1", "equal to 0"], id="negative seed"),
        pytest.param(
            "[train]\nmicro_batch_size = 0", ["train.micro_batch_size = 0", "equal to 1"], id="no micro-batch"
        ),
        pytest.param("[train]\ngrad_norm_clip = -1.0", ["train.grad_norm_clip = -1.0", "equal to 0"], id="clip"),
        pytest.param("[train.optim]\neps = 0.0", ["train.optim.eps = 0.0", "greater than 0"], id="eps"),
        pytest.param("[train.optim]\nbetas = [0.9, 1.0]", ["train.optim.betas.1 = 1.0", "less than 1"], id="beta of 1"),
        pytest.param("[train.lr_schedule]\nlr = inf", ["train.lr_schedule.lr = inf", "finite"], id="infinite lr"),
        pytest.param("[train.lr_schedule]\nlr = nan", ["train.lr_schedule.lr = nan", "finite"], id="lr not a number"),
        pytest.param("[model]\ndropout = 1.0", ["model.dropout = 1.0", "less than 1"], id="dropout of 1"),
        pytest.param("[model]\nvocab_size = 65537", ["model.vocab_size = 65537", "65536"], id="ids above 16 bits"),
        pytest.param("[log]\neval_interval = 0", ["log.eval_interval = 0", "equal to 1"], id="no interval"),
        pytest.param("[log]\nrun_name = 'a/b'", ["log.run_name", "'a/b'"], id="run name with a slash"),
        pytest.param("[log]\nrun_name = '..'", ["log.run_name", "'..'"], id="run name that leaves log_dir"),
        pytest.param(
            "[train]\ntopology = 'star'",
            ["train.topology", "'star'", "'complete', 'exp', 'ring' or 'alternating-exp-ring'"],
            id="unknown topology",
        ),
        pytest.param("[train]\nbackend = 'ddp'", ["'ddp'", "'decentdp' or 'pytorchddp'"], id="unknown backend"),
        pytest.param("[train.optim]\nname = 'sgd'", ["'sgd'", "'accumadamw' or 'adamw'"], id="unknown optimizer"),
        pytest.param("[train.lr_schedule]\nname = 'linear'", ["'linear'", "'cosine'"], id="unknown schedule"),
        pytest.param(
            "[model]\nn_embd = 10\nn_heads = 3", ["model.n_embd = 10", "divisible by n_heads = 3"], id="heads"
        ),
        pytest.param(
            "[train]\nn_steps = 2000", ["train.lr_schedule.warmup_steps = 2000", "below n_steps = 2000"], id="warm-up"
        ),
        pytest.param(
            "[train.lr_schedule]\nlr = 1e-5", ["train.lr_schedule.eta_min = 6e-05", "lr = 1e-05"], id="eta_min"
        ),
    ],
)
def test_an_error_is_one_line_with_file_key_value_and_what_would_work(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    message = error(tmp_path, text)
    assert message.startswith(f"{tmp_path / 'c.toml'}: ")
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize(
    "text", ["[train.optim]\nname = 'sgd'", "dataset = 5", "log_dir = 5"], ids=["name", "dataset", "log_dir"]
)
def test_one_mistake_is_not_counted_as_two(tmp_path: Path, text: str) -> None:
    assert "more)" not in error(tmp_path, text)


def test_the_number_of_other_mistakes_is_told(tmp_path: Path) -> None:
    assert error(tmp_path, "[train]\nn_steps = 0\nseed = -1\n[model]\nbias = 3").endswith(" (and 2 more)")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
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
        ("train.n_steps=", ["train.n_steps = ''", "integer"]),
        ('train.n_steps="5000"', ["train.n_steps = '5000'", "integer"]),
        ("train.topology=star", ["train.topology = 'star'", "'exp'"]),
        ("train=5", ["train = 5"]),
        ("log_dir.x=5", ["log_dir"]),
    ],
)
def test_a_wrong_override_is_one_line(tmp_path: Path, override: str, parts: list[str]) -> None:
    message = error(tmp_path, "", override)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


def test_an_override_inside_a_value_of_the_file_names_both(tmp_path: Path) -> None:
    assert error(tmp_path, "train = 5", "train.seed=3") == 'override "train.seed=3": train is a value, not a table'


@given(override=st.text(st.sampled_from("train.seed=3\"'[]{}#\n\\ \t"), max_size=20))
def test_any_override_is_taken_or_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, override: str) -> None:
    path = tmp_path_factory.getbasetemp() / "empty.toml"
    path.write_text("")
    try:
        load_config(path, [override])
        message = ""
    except ValueError as error:
        message = str(error)
    assert "\n" not in message


@pytest.mark.parametrize("text", ['"a\\nb" = 1', "[train]\n'x\ty' = 1", '[train]\n"seed\\n" = 1'])
def test_a_key_with_a_line_break_is_still_one_line(tmp_path: Path, text: str) -> None:
    assert "\n" not in error(tmp_path, text)


# --- Overrides ---


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.n_steps=5000", "train.n_steps", 5000),
        ("train.n_steps = 5_000", "train.n_steps", 5000),
        ("in_memory=false", "in_memory", False),
        ("train.lr_schedule.lr=1e-3", "train.lr_schedule.lr", 1e-3),
        ("train.optim.betas=[0.8, 0.9]", "train.optim.betas", (0.8, 0.9)),
        ("train.topology=ring", "train.topology", "ring"),
        ('train.topology="ring"', "train.topology", "ring"),
        ("log_dir=/some where/else", "log_dir", "/some where/else"),
        ("log_dir=a=b", "log_dir", "a=b"),
        ("train.optim={name = 'adamw'}", "train.optim.name", "adamw"),
    ],
)
def test_an_override_has_a_dotted_key_and_a_toml_value_or_a_bare_word(
    tmp_path: Path, override: str, key: str, value: object
) -> None:
    assert leaves(load(tmp_path, "", override).model_dump())[key] == value


def test_an_override_wins_over_the_file_and_a_later_one_over_an_earlier(tmp_path: Path) -> None:
    text = "[train]\nseed = 1\nn_steps = 7000"
    cfg = load(tmp_path, text, "train.seed=2", "log.eval_steps=9", "train.seed=3")
    assert (cfg.train.seed, cfg.train.n_steps, cfg.log.eval_steps) == (3, 7000, 9)


def test_a_run_can_be_named_by_its_job_id_alone(tmp_path: Path) -> None:
    assert load(tmp_path, "", "log.run_name=3197816").log.run_name == "3197816"


def test_an_override_is_checked_together_with_the_file(tmp_path: Path) -> None:
    assert "warmup_steps = 2000" in error(tmp_path, "[train]\nn_steps = 3000", "train.n_steps=1000")
    assert load(tmp_path, "[train]\nn_steps = 1000", "train.n_steps=3000").train.n_steps == 3000


# --- Defaults ---


def test_the_defaults_are_those_of_the_paper(tmp_path: Path) -> None:
    defaults = leaves(load(tmp_path).model_dump())
    assert {key: defaults.get(key) for key in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(("name", "betas"), [("adamw", (0.9, 0.95)), ("accumadamw", (0.9, 0.98))])
def test_betas_follow_the_optimizer_unless_given(tmp_path: Path, name: str, betas: tuple[float, float]) -> None:
    assert load(tmp_path, f"[train.optim]\nname = '{name}'").train.optim.betas == betas
    given = load(tmp_path, f"[train.optim]\nname = '{name}'\nbetas = [0.5, 0.6]")
    assert given.train.optim.betas == (0.5, 0.6)


def test_data_dir_follows_dataset_unless_given(tmp_path: Path) -> None:
    assert load(tmp_path, "dataset = 'sotu'").data_dir == "./data/sotu"
    assert load(tmp_path, "dataset = 'sotu'", "data_dir=/elsewhere").data_dir == "/elsewhere"


# --- The loaded configuration ---


names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,8}", fullmatch=True)


@given(
    tree=st.fixed_dictionaries(
        {},
        optional={
            "log_dir": st.text(max_size=8),
            "dataset": names,
            "data_dir": st.text(max_size=8),
            "in_memory": st.booleans(),
            "log": st.fixed_dictionaries({}, optional={"run_name": names, "eval_interval": st.integers(1, 10**6)}),
            "train": st.fixed_dictionaries(
                {},
                optional={
                    "topology": st.sampled_from(["complete", "exp", "ring", "alternating-exp-ring"]),
                    "micro_batch_size": st.integers(1, 64),
                    "grad_norm_clip": st.floats(0, 1e3),
                    "optim": st.fixed_dictionaries(
                        {},
                        optional={
                            "name": st.sampled_from(["adamw", "accumadamw"]),
                            "betas": st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=2),
                            "eps": st.floats(1e-30, 1),
                        },
                    ),
                },
            ),
        },
    )
)
def test_to_toml_reads_back_to_the_same(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> None:
    cfg = Config.model_validate(tree)
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    path.write_bytes(cfg.to_toml().encode())
    assert load_config(path) == cfg
    assert load_config(path).to_toml() == cfg.to_toml()


def test_to_toml_says_all_that_has_a_value(tmp_path: Path) -> None:
    with_a_value = {key for key, value in DEFAULTS.items() if value is not None}
    assert leaves(tomli.loads(load(tmp_path).to_toml())).keys() == with_a_value


def test_it_cannot_be_changed(tmp_path: Path) -> None:
    cfg = load(tmp_path)
    for section, key in [(cfg, "log_dir"), (cfg.train, "seed"), (cfg.train.optim, "eps"), (cfg.model, "n_embd")]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, getattr(section, key))


@given(world_size=st.integers(1, 64), micro=st.none() | st.integers(1, 32), batch=st.integers(1, 4096))
def test_micro_batches_divide_the_global_batch_or_the_error_names_one_that_they_divide(
    world_size: int, micro: int | None, batch: int
) -> None:
    cfg = TrainConfig(global_batch_size=batch, micro_batch_size=micro)
    if batch % (world_size * (micro or 1)):
        with pytest.raises(ValueError, match=rf"^train\.global_batch_size = {batch} .*; (\d+) would be$") as caught:
            cfg.n_micro_batches(world_size)
        batch = int(str(caught.value).split()[-3])
        cfg = TrainConfig(global_batch_size=batch, micro_batch_size=micro)
    assert world_size * (micro or batch // world_size) * cfg.n_micro_batches(world_size) == batch


def test_without_micro_batch_size_a_workers_share_is_one_micro_batch() -> None:
    assert TrainConfig(global_batch_size=480).n_micro_batches(16) == 1


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    load_config(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.gossip_every=0", "train.gossip_every = 0: should be greater than or equal to 1"),
        ("train.comm_dtype=float16", "train.comm_dtype = 'float16': should be 'float32' or 'bfloat16'"),
        ("train.timeout_s=0", "train.timeout_s = 0: should be greater than 0"),
        ("train.timeout_s=1e18", "train.timeout_s = 1e+18: should be less than or equal to 1000000"),
    ],
)
def test_options_of_the_exchange_have_bounds(tmp_path: Path, override: str, message: str) -> None:
    assert message in error(tmp_path, "", override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.comm_dtype=bfloat16", "train.topology=complete"], 'does not go with topology = "complete"'),
        (
            ["train.comm_dtype=bfloat16", "train.backend=pytorchddp"],
            'train.comm_dtype = bfloat16 is for backend = "decentdp": leave it out with "pytorchddp"',
        ),
        (["train.gossip_every=2", "train.backend=pytorchddp"], 'train.gossip_every = 2 is for backend = "decentdp"'),
        (["train.gossip_every=9", "train.n_steps=17", "train.lr_schedule.warmup_steps=0"], "use at most 8"),
    ],
)
def test_options_of_the_exchange_that_do_not_go_together_are_refused(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    assert message in error(tmp_path, "", *overrides)


# What the code calls a section that it is handed; others are read as cfg.<section>.<key>.
HANDED_ON_AS = {"": "cfg", "model": "cfg", "train.optim": "cfg", "train.lr_schedule": "schedule"}


def test_every_key_is_read_somewhere() -> None:
    folders = [ROOT / folder for folder in ("optim", "decent", "data")]
    files = [ROOT / f"{name}.py" for name in ("train", "model", "config")]
    files += [path for folder in folders for path in folder.rglob("*.py")]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    attributes = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)]
    read = {".".join(ast.unparse(node).split(".")[-2:]) for node in attributes}
    unread = set()
    for key in schema_keys(Config):
        section, _, name = key.rpartition(".")
        owners = {section.split(".")[-1], HANDED_ON_AS.get(section), "self" if section == "train" else None}
        if not any(f"{owner}.{name}" in read for owner in owners):
            unread.add(key)
    assert unread == {"train.lr_schedule.name"}  # there is one schedule only


def schema_keys(section: type[BaseModel], prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys |= schema_keys(kind, f"{prefix}{name}.")
        else:
            keys.add(prefix + name)
    return keys


def test_importing_config_does_not_import_torch() -> None:
    program = "import sys, config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, check=False).returncode == 0
