"""What a TOML configuration may say: every key with its type, bound, default and meaning.

`load_config` checks everything that can be checked without looking at the machine; what depends on the number of
workers is a method that takes it. Reads no environment variable and does not import torch.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tomli
import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

Backend = Literal["decentdp", "pytorchddp"]
TopologyName = Literal["complete", "exp", "ring", "alternating-exp-ring"]
OptimizerName = Literal["accumadamw", "adamw"]

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # of a folder: not "..", no "/"


def _job_id_as_text(value: object) -> object:
    return str(value) if type(value) is int else value


RunName = Annotated[Name, BeforeValidator(_job_id_as_text)]  # log.run_name=3197816 on a command line is a number


class Section(BaseModel):
    """A TOML table: immutable, without unknown keys; "5" is not 5."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class LogConfig(Section):
    wandb_log: bool = True  # report to Weights & Biases
    wandb_project: str = "gpt2-owt"
    eval_interval: Count = 1000  # steps between two evaluations
    eval_steps: Count = 200  # global batches per evaluation and split
    eval_full: bool = False  # the validation loss is that of the whole split, whatever eval_steps, batch and workers
    checkpoint_interval: Count | None = None  # steps between two checkpoints; None: eval_interval
    keep_checkpoints: Count = 2  # the newest so many stay
    run_name: RunName | None = None  # folder in log_dir; None: SLURM_JOB_ID, else the time


def _usual_betas(optim: dict[str, Any]) -> tuple[float, float]:
    return (0.9, 0.95) if optim["name"] == "adamw" else (0.9, 0.98)


class OptimConfig(Section):
    name: OptimizerName = "accumadamw"
    betas: tuple[Fraction, Fraction] = Field(default_factory=_usual_betas, strict=False)  # TOML has lists, no tuples
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1  # of parameters with two or more dimensions
    accum_steps: Count = 8  # accumadamw: window of the moments, in optimizer steps; adamw does not read it


class LRSchedule(Section):
    name: Literal["cosine"] = "cosine"
    lr: NonNegative = 6e-4  # at the end of the warm-up
    warmup_steps: Annotated[int, Field(ge=0)] = 2000
    eta_min: NonNegative = 6e-5  # in the last step

    @model_validator(mode="after")
    def _eta_min_below_lr(self) -> "LRSchedule":
        if self.eta_min > self.lr:
            raise ValueError(f"eta_min = {self.eta_min} is above lr = {self.lr}")
        return self


class TrainConfig(Section):
    backend: Backend = "decentdp"
    topology: TopologyName | None = None  # decentdp: who averages with whom; None: as the number of nodes suggests
    comm_dtype: Literal["float32", "bfloat16"] = "float32"  # decentdp: what travels between pairs and between nodes
    gossip_every: Count = 1  # decentdp: steps between two exchanges; each hides behind that many steps
    stop_on_nan: bool = True  # end the run when a loss is not finite; its checkpoints stay
    timeout_s: Annotated[float, Field(gt=0, le=1e6)] = 600.0  # how long a worker waits for another one at most
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    global_batch_size: Count = 480  # sequences per step, over all workers
    micro_batch_size: Count | None = None  # sequences per forward and backward; None: a worker's whole share
    context_length: Count = 1024  # tokens per sequence
    n_steps: Count = 600_000
    grad_norm_clip: NonNegative = 1.0  # global norm of a worker's gradient; 0: off
    compile: bool = True  # torch.compile the model
    amp: bool = True  # bfloat16 autocast, or float16 where the GPU lacks it
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
    n_layers: Count = 12
    n_heads: Count = 12
    n_embd: Count = 768  # channels
    dropout: Fraction = 0.0
    vocab_size: Annotated[int, Field(ge=1, le=2**16)] = 50304  # tokens are stored as uint16
    bias: bool = False  # in linear layers and layer norms

    @model_validator(mode="after")
    def _heads_divide_channels(self) -> "ModelConfig":
        if self.n_embd % self.n_heads:
            raise ValueError(f"n_embd = {self.n_embd} is not divisible by n_heads = {self.n_heads}")
        return self


class Config(Section):
    log_dir: str = "./log"
    dataset: Name = "openwebtext"  # a folder of data/
    data_dir: str = Field(default_factory=lambda config: f"./data/{config['dataset']}")  # holds train.bin and val.bin
    in_memory: bool = True  # read the corpus into memory once per node, instead of mapping the files
    checkpoint: str = ""  # where to start: a checkpoint or a run directory; "": from scratch, or where this run was
    log: LogConfig = LogConfig()
    train: TrainConfig = TrainConfig()
    model: ModelConfig = ModelConfig()

    def evaluates_after(self, n_steps: int) -> bool:
        return n_steps % self.log.eval_interval == 0 or n_steps == self.train.n_steps

    def saves_after(self, n_steps: int) -> bool:
        interval = self.log.checkpoint_interval or self.log.eval_interval
        return n_steps % interval == 0 or n_steps == self.train.n_steps

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
    if first["type"] == "value_error":
        return f"{key}.{first['msg'].removeprefix('Value error, ')}{more}"
    if first["type"] == "model_type":
        return f"{key} = {first['input']!r}: should be a table{more}"
    if first["type"] == "missing":
        return f"{key} is missing{more}"
    return f"{key} = {first['input']!r}: {first['msg'].removeprefix('Input ')}{more}"


def _known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += _known_keys(kind, f"{prefix}{name}.")
        keys.append(prefix + name)
    return keys
