"""generation_config.json: how a checkpoint wants to be sampled when nobody says otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from glm5.checkpoint.directory import GENERATION_FILE, Checkpoint
from glm5.config import ModelConfig
from glm5.disk.files import write_atomic
from glm5.errors import ConfigError, RequestError
from glm5.runtime.sampling_params import SamplingParams

_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def sampling_defaults(checkpoint: Checkpoint) -> SamplingParams:
    """How the checkpoint wants to be sampled; greedy without generation_config.json.

    `do_sample` absent counts as true where a temperature is given, as the vendor's files mean it.
    """
    raw = checkpoint.generation
    if not raw:
        return SamplingParams()
    values = {key: raw[key] for key in _KEYS if raw.get(key) is not None}
    samples = raw.get("do_sample")
    if samples is False or (samples is None and "temperature" not in values):
        values["temperature"] = 0.0
    values.setdefault("temperature", 1.0)
    try:
        return SamplingParams(**values)
    except RequestError as error:
        raise ConfigError(f"{checkpoint.directory / GENERATION_FILE}: {error}") from None


def stated_eos_token_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The end tokens that the file names; none without the file or the key."""
    ends = checkpoint.generation.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    wrong = next((end for end in ends if type(end) is not int or end < 0), None)
    if wrong is not None:
        raise ConfigError(
            f"{checkpoint.directory / GENERATION_FILE}: eos_token_id has {wrong!r}; it must be token ids"
        )
    return tuple(ends)


def write_generation_config(directory: Path, config: ModelConfig, defaults: SamplingParams) -> None:
    """Write the defaults in the form `transformers` reads."""
    values: dict[str, Any] = {"do_sample": defaults.temperature > 0}
    if defaults.temperature > 0:
        values |= {key: getattr(defaults, key) for key in ("temperature", "top_k", "top_p", "min_p")}
    if defaults.repetition_penalty != 1:
        values["repetition_penalty"] = defaults.repetition_penalty
    if config.eos_token_ids:
        values["eos_token_id"] = list(config.eos_token_ids)
    if config.pad_token_id is not None:
        values["pad_token_id"] = config.pad_token_id
    write_atomic(directory / GENERATION_FILE, json.dumps(values, indent=2) + "\n")
