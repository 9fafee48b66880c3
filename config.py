"""Schema of the TOML configuration: every key with its type, bounds, default and description.

`load_config` checks everything that can be checked without looking at the machine; what depends on the number of
workers is a method that takes it. docs/configuration.md is printed from here by scripts/print_configuration.py.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tomli
import tomli_w
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

Backend = Literal["decentdp", "pytorchddp"]
TopologyName = Literal["complete", "exp", "ring", "alternating-exp-ring"]
CommDtype = Literal["float32", "bfloat16"]
OptimizerName = Literal["accumadamw", "adamw"]

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Timeout = Annotated[float, Field(gt=0, le=1e6)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
VocabSize = Annotated[int, Field(ge=1, le=2**16)]  # tokens are stored as uint16
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # of a folder: not "..", no "/"


def _job_id_as_text(value: object) -> object:
    return str(value) if type(value) is int else value


def _expand_home(path: str) -> str:
    """Return the path with a leading ~ expanded, as a shell would; $NAME is refused."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"{expanded.split('/')[0]} is not the home of a user; write ./~ for a folder with that name")
    if variable := re.search(r"\$(\w+|{\w+})", path):
        raise ValueError(f"{variable[0]} is not expanded here: write the path itself, or let the shell expand it")
    return expanded


RunName = Annotated[Name, BeforeValidator(_job_id_as_text)]  # log.run_name=3197816 on a command line is a number
PathText = Annotated[str, AfterValidator(_expand_home)]


class Section(BaseModel):
    """A TOML table: immutable, without unknown keys; "5" is not 5."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class LogConfig(Section):
    wandb_log: bool = Field(default=True, description="report to Weights & Biases (`WANDB_MODE=offline` works)")
    wandb_project: str = Field(default="gpt2-owt", description="project of Weights & Biases")
    eval_interval: Count = Field(default=1000, description="steps between two evaluations")
    eval_steps: Count = Field(default=200, description="global batches per evaluation and split")
    eval_full: bool = Field(default=False, description="take the validation loss over the whole of `val.bin`")
    checkpoint_interval: Count | None = Field(
        default=None, description="steps between two checkpoints; None means `eval_interval`"
    )
    keep_checkpoints: Count = Field(default=2, description="number of checkpoints that stay, the newest ones")
    run_name: RunName | None = Field(default=None, description="run folder; None means the SLURM job id, else the time")


def _usual_betas(optim: dict[str, Any]) -> tuple[float, float]:
    return (0.9, 0.95) if optim["name"] == "adamw" else (0.9, 0.98)


class OptimConfig(Section):
    name: OptimizerName = Field(default="accumadamw", description="optimizer; both work with both backends")
    betas: tuple[Fraction, Fraction] = Field(
        default_factory=_usual_betas,
        strict=False,  # TOML has lists, no tuples
        description="decay of the first and second moment; adamw's default is `[0.9, 0.95]`",
    )
    eps: Positive = Field(default=1e-8, description="added to the root of the second moment")
    weight_decay: NonNegative = Field(default=0.1, description="decay of parameters with two or more dimensions")
    accum_steps: Count = Field(default=8, description="accumadamw: steps per update of moments; try half the workers")


class LRSchedule(Section):
    name: Literal["cosine"] = Field(default="cosine", description="linear warm-up, then half a cosine to `eta_min`")
    lr: NonNegative = Field(default=6e-4, description="learning rate at the end of the warm-up")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(default=2000, description="steps of warm-up, below `n_steps`")
    eta_min: NonNegative = Field(default=6e-5, description="learning rate in the last step, at most `lr`")

    @model_validator(mode="after")
    def _eta_min_below_lr(self) -> "LRSchedule":
        if self.eta_min > self.lr:
            raise ValueError(f"eta_min = {self.eta_min} is above lr = {self.lr}")
        return self


class TrainConfig(Section):
    backend: Backend = Field(default="decentdp", description="decentralized, or All-Reduce (pytorchddp)")
    topology: TopologyName | None = Field(
        default=None, description="decentdp: None means alternating-exp-ring on an even number of nodes, else exp"
    )
    comm_dtype: CommDtype = Field(default="float32", description="decentdp: bfloat16 halves traffic; not for complete")
    gossip_every: Count = Field(default=1, description="decentdp: steps between exchanges; more for slower networks")
    stop_on_nan: bool = Field(default=True, description="end the run when a loss is not finite; its checkpoints stay")
    timeout_s: Timeout = Field(default=600.0, description="seconds that a worker waits for another one before it ends")
    seed: Seed = Field(default=42, description="seed of initialisation, batches and dropout")
    global_batch_size: Count = Field(
        default=480, description="sequences per step over all workers; a multiple of workers x `micro_batch_size`"
    )
    micro_batch_size: Count | None = Field(
        default=None, description="sequences per forward and backward pass; None means a worker's whole share"
    )
    context_length: Count = Field(default=1024, description="tokens per sequence")
    n_steps: Count = Field(default=600_000, description="optimizer steps")
    grad_norm_clip: NonNegative = Field(
        default=1.0, description="largest global norm of a worker's gradient; 0 means no clipping"
    )
    compile: bool = Field(default=True, description="`torch.compile` the model; on a CPU this needs a C++ compiler")
    amp: bool = Field(
        default=True, description="bfloat16 autocast; where unsupported, float16 on GPUs and float32 on CPUs"
    )
    optim: OptimConfig = OptimConfig()
    lr_schedule: LRSchedule = LRSchedule()

    @model_validator(mode="after")
    def _warmup_ends(self) -> "TrainConfig":
        if self.lr_schedule.warmup_steps >= self.n_steps:
            raise ValueError(
                f"lr_schedule.warmup_steps = {self.lr_schedule.warmup_steps} must be below n_steps = {self.n_steps}"
            )
        return self

    @model_validator(mode="after")
    def _exchange_is_possible(self) -> "TrainConfig":
        for key, value, default in (("comm_dtype", self.comm_dtype, "float32"), ("gossip_every", self.gossip_every, 1)):
            if self.backend != "decentdp" and value != default:
                raise ValueError(f'{key} = {value} is for backend = "decentdp": leave it out with "{self.backend}"')
        if self.gossip_every > 1 and 2 * self.gossip_every > self.n_steps:
            raise ValueError(
                f"gossip_every = {self.gossip_every}: no exchange would end within n_steps = {self.n_steps}; "
                f"use at most {max(1, self.n_steps // 2)}"
            )
        if self.comm_dtype != "float32" and self.topology == "complete":
            raise ValueError(
                f'comm_dtype = "{self.comm_dtype}" does not go with topology = "complete": use "exp" or "ring"'
            )
        return self

    def rows_per_micro_batch(self, world_size: int) -> int:
        """Sequences of a worker's forward and backward pass."""
        return self.micro_batch_size or max(1, self.global_batch_size // world_size)

    def n_micro_batches(self, world_size: int) -> int:
        """Forward and backward passes per step and worker.

        Raises:
            ValueError: the global batch cannot be cut into equal micro-batches on so many workers.
        """
        n, rest = divmod(self.global_batch_size, world_size * self.rows_per_micro_batch(world_size))
        if rest:
            divisor = f"{world_size} workers" + (
                f" x micro_batch_size = {self.micro_batch_size}" if self.micro_batch_size else ""
            )
            unit = world_size * (self.micro_batch_size or 1)
            nearest = max(unit, self.global_batch_size // unit * unit)
            raise ValueError(
                f"train.global_batch_size = {self.global_batch_size} is not divisible by {divisor}; {nearest} would be"
            )
        return n


class ModelConfig(Section):
    n_layers: Count = Field(default=12, description="transformer blocks")
    n_heads: Count = Field(default=12, description="attention heads per block, a divisor of `n_embd`")
    n_embd: Count = Field(default=768, description="channels")
    dropout: Fraction = Field(default=0.0, description="probability of dropping an activation during training")
    vocab_size: VocabSize = Field(default=50304, description="GPT-2 has 50257; a multiple of 64 is faster on GPUs")
    bias: bool = Field(default=False, description="biases in linear layers and layer norms")

    @model_validator(mode="after")
    def _heads_divide_channels(self) -> "ModelConfig":
        if self.n_embd % self.n_heads:
            raise ValueError(f"n_embd = {self.n_embd} is not divisible by n_heads = {self.n_heads}")
        return self


class Config(Section):
    log_dir: PathText = Field(default="./log", description="folder of the run directories")
    dataset: Name = Field(default="openwebtext", description="folder in `data/`: openwebtext, sotu, or your own")
    data_dir: PathText = Field(
        default_factory=lambda config: f"./data/{config['dataset']}",
        description="folder of `train.bin` and `val.bin`, by default `./data/<dataset>`",
    )
    in_memory: bool = Field(default=True, description="load the corpus into memory once per node; false maps its files")
    checkpoint: PathText = Field(
        default="",
        description="checkpoint or run directory to start from; empty means this run's own, else from scratch",
    )
    log: LogConfig = LogConfig()
    train: TrainConfig = TrainConfig()
    model: ModelConfig = ModelConfig()

    def evaluates_after(self, done: int) -> bool:
        return done % self.log.eval_interval == 0 or done == self.train.n_steps

    def saves_after(self, done: int) -> bool:
        interval = self.log.checkpoint_interval or self.log.eval_interval
        return done % interval == 0 or done == self.train.n_steps

    def to_toml(self) -> str:
        """The whole resolved configuration; `load_config` reads it back to an equal one."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The configuration in `path`, changed by overrides such as "train.n_steps=100" (dotted keys, TOML values).

    Raises:
        ValueError: anything that is wrong, in one line that names the file and the key.
    """
    try:
        tree = _parse(path)
        for override in overrides or []:
            _apply_(tree, override)
        return Config.model_validate(tree)
    except ValidationError as error:
        message = f"{path}: {_first_mistake(error)}"
    except ValueError as error:
        message = str(error)
    raise ValueError("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))  # a key may hold a line break


def _parse(path: str | Path) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    try:
        return tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        line = error.doc.split("\n")[error.lineno - 1].strip()
        raise ValueError(f"{path}: line {error.lineno}: {error.msg}: {line}") from None


def _apply_(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f'override "{override}": expected key=value, as in train.n_steps=100')
    try:
        parsed = tomli.loads(f"value = {value}")["value"]
    except tomli.TOMLDecodeError:
        parsed = value  # a bare word, so that quotes need no quoting in the shell
    *tables, last = key.strip().split(".")
    for name in tables:
        inner: Any = tree.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ValueError(f'override "{override}": {name} is a value, not a table')
        tree = cast(dict[str, Any], inner)
    tree[last] = parsed


def _first_mistake(error: ValidationError) -> str:
    # A default that depends on a wrong key cannot be made: no mistake of the user's.
    first, *others = [e for e in error.errors() if e["type"] != "default_factory_not_called"]
    key = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(others)} more)" if others else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(Config)
        in_another_table = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
        near = in_another_table or difflib.get_close_matches(key, known, n=1)
        return f"unknown key {key}" + (f'; did you mean "{near[0]}"?' if near else "") + more
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if first["type"] == "value_error" and isinstance(first["input"], dict):
        return f"{key}.{message}{more}"  # the check of a table names the key itself
    if first["type"] == "model_type":
        return f"{key} = {first['input']!r}: should be a table{more}"
    if first["type"] == "missing":
        return f"{key} is missing{more}"
    return f"{key} = {first['input']!r}: {message}{more}"


def _known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += _known_keys(kind, f"{prefix}{name}.")
        keys.append(prefix + name)
    return keys
