"""What a training run is, read from a TOML file: an unknown or impossible key is an error.

Paths in a recipe are relative to the directory in which `glm5 train` is run.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from glm5.config import ModelConfig
from glm5.errors import ConfigError, RecipeError

_Decay = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# Keys of a config.json that a config keeps as they are and reads.
_READ_FROM_EXTRA = {
    "rope_parameters", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset",
    "scoring_func", "topk_method", "moe_layer_freq", "glm5_chat",
}  # fmt: skip


class TokenizerSection(_Section):
    """Train a byte-level BPE, or take the one of a checkpoint directory (`path`)."""

    vocab_size: int = Field(default=8192, ge=300)  # control tokens included
    sample_mb: float = Field(default=24.0, gt=0)  # text the merges are learned from
    path: Path | None = None


class Stage(_Section):
    """What the data is made of until this share of the run's tokens.

    mix: weight by language (`en`, `zh`, `code`, `pair`), by task (`tasks-dictionary`) or by source
    name; a source takes the most specific weight and languages are shared out by size.
    """

    until: float = Field(default=1.0, gt=0, le=1)
    mix: dict[str, float]


class DataSection(_Section):
    corpus: Path = Path("data/corpus")
    shards: Path = Path("data/shards")
    sequence_length: int = Field(default=512, ge=8)
    stages: list[Stage] = Field(min_length=1)
    # "prefix": tokens up to a drawn point (in chat rows: the prompt) see each other both ways.
    attention: Literal["causal", "prefix"] = "causal"

    @model_validator(mode="after")
    def _stages_rise(self) -> DataSection:
        ends = [stage.until for stage in self.stages]
        if ends != sorted(set(ends)) or ends[-1] != 1.0:
            raise ValueError("the stages' `until` must rise and end at 1.0")
        for stage in self.stages:
            if not stage.mix or min(stage.mix.values()) < 0 or sum(stage.mix.values()) <= 0:
                raise ValueError("a stage's mix needs weights >= 0, at least one above")
        return self


class OptimizerSection(_Section):
    """Muon for matrices with AdamW for the rest, or AdamW for all (GLM-4.5 report, section 2.4)."""

    kind: Literal["muon", "adamw"] = "muon"
    lr: float = Field(default=2e-3, gt=0)
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    warmup: float = Field(default=0.02, ge=0, lt=1)  # share of the steps
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(default=0.1, ge=0)
    betas: tuple[_Decay, _Decay] = (0.9, 0.95)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    grad_clip: float = Field(default=1.0, gt=0)


class LossSection(_Section):
    """Weights of what is added to the language-model loss; 0 turns a part off."""

    mtp: float = Field(default=0.3, ge=0)
    mtp_every: int = Field(default=1, ge=1)  # steps between two MTP losses
    balance: float = Field(default=1e-4, ge=0)  # sequence level
    bias_update: float = Field(default=1e-3, ge=0)  # loss-free balancing: step of the router bias
    indexer: float = Field(default=1.0, ge=0)
    indexer_every: int = Field(default=8, ge=1)  # steps between two indexer losses
    indexer_rows: int = Field(default=2, ge=1)  # rows of the batch it is taken on
    expert_dropout: float = Field(default=0.0, ge=0, lt=1)


class RunSection(_Section):
    steps: int = Field(ge=1)
    batch_rows: int = Field(default=16, ge=1)
    micro_batch_rows: int | None = Field(default=None, ge=1)  # None = the whole batch at once
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int | None = Field(default=None, ge=1, le=1024)
    save_every: int = Field(default=500, ge=1)
    keep: int = Field(default=2, ge=1)
    eval_every: int = Field(default=500, ge=1)
    eval_rows: int = Field(default=16, ge=1)  # held-out rows per language in a run's evaluations

    @model_validator(mode="after")
    def _micro_divides(self) -> RunSection:
        if self.micro_batch_rows and self.batch_rows % self.micro_batch_rows:
            raise ValueError("batch_rows must be a multiple of micro_batch_rows")
        return self


class Recipe(_Section):
    """A whole run. `model` holds the keys of a `config.json`; vocab_size comes from the tokenizer."""

    name: str = Field(pattern=r"^[\w-][\w.-]*$")  # of a folder too, so not "." or ".."
    seed: int = Field(default=0, ge=0, lt=1 << 40)  # every step draws from a generator seeded by it
    output: Path
    model: dict[str, Any]
    tokenizer: TokenizerSection = TokenizerSection()
    data: DataSection
    optimizer: OptimizerSection = OptimizerSection()
    loss: LossSection = LossSection()
    run: RunSection

    @property
    def shard_dir(self) -> Path:
        """Where the encoded corpus and the tokenizer of this recipe lie."""
        return self.data.shards / self.name

    def model_config_for(self, vocab_size: int, eos: tuple[int, ...], pad: int | None) -> ModelConfig:
        """The architecture, with what the tokenizer decides filled in."""
        keys = {
            "model_type": "glm_moe_dsa",
            **self.model,
            "vocab_size": vocab_size,
            "eos_token_id": list(eos),
            "pad_token_id": pad,
            "attention_mask_type": self.data.attention,
        }
        try:
            config = ModelConfig.from_dict(keys)
        except ConfigError as error:
            raise RecipeError(f"recipe {self.name}: [model] {error}") from None
        known = {field.name for field in dataclasses.fields(ModelConfig)}
        for key in self.model:
            if key in config.extra and key not in _READ_FROM_EXTRA:
                raise RecipeError(f"recipe {self.name}: model.{key}: unknown key{_nearest(key, known)}")
        if self.data.sequence_length > config.max_position_embeddings:
            raise RecipeError(
                f"recipe {self.name}: data.sequence_length {self.data.sequence_length} is more than "
                f"model.max_position_embeddings {config.max_position_embeddings}"
            )
        return config

    def check_model(self) -> None:
        """Raises RecipeError when [model] cannot be built, before there is a tokenizer."""
        self.model_config_for(self.tokenizer.vocab_size, (), None)


def read_recipe(path: str | Path, changes: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe file, or a shipped one by its name; `changes` override dotted keys.

    Raises RecipeError naming the file and the key.
    """
    text, source = _recipe_text(path)
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not TOML, or an endless number
        raise RecipeError(f"{source}: not TOML: {error}") from None
    for key, value in (changes or {}).items():
        _set_dotted(raw, key, value)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{source}: {'; '.join(map(_problem, error.errors()))}") from None


def _problem(error: ErrorDetails) -> str:
    """`run.stepz: unknown key; did you mean steps?`: one problem of a recipe."""
    where = ".".join(str(part) for part in error["loc"]) or "recipe"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key{_nearest(str(error['loc'][-1]), _keys_of(error['loc'][:-1]))}"
    if error["type"] == "missing":
        return f"{where}: is missing"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}"


def _keys_of(path: tuple[int | str, ...]) -> set[str]:
    """The keys of the section at a path of names and list places."""
    section: Any = Recipe
    for part in path:
        if isinstance(part, str):
            section = section.model_fields[part].annotation
        else:
            section = get_args(section)[0]
    return set(section.model_fields)


def _nearest(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def parse_change(text: str) -> tuple[str, Any]:
    """`run.steps=100` to (key, value); the value is TOML, or a plain string if it is none."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {text}: expected KEY=VALUE, e.g. run.steps=100")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        return key, value


def _recipe_text(path: str | Path) -> tuple[str, str]:
    file = Path(path)
    if file.suffix != ".toml" and not file.is_file():
        shipped = resources.files("glm5.training") / "recipes" / f"{path}.toml"
        if shipped.is_file():
            return shipped.read_text(encoding="utf-8"), f"recipe {path}"
    try:
        return file.read_text(encoding="utf-8"), str(file)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise RecipeError(
            f"{file}: cannot be read ({error.strerror}); shipped recipes: nano, smoke"
        ) from None


def _set_dotted(raw: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
        if not isinstance(raw, dict):
            raise RecipeError(f"--set {key}: {parent} is no table")
    raw[last] = value
