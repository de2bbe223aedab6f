"""generation_config.json: how a checkpoint wants to be sampled when nobody says otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from glm5.config import MAX_CONFIG_BYTES, ModelConfig
from glm5.errors import ConfigError, RequestError
from glm5.files import write_atomic
from glm5.runtime.sampling import SamplingParams

FILE = "generation_config.json"
_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_generation_config(directory: Path) -> SamplingParams:
    """The defaults of a checkpoint directory; greedy without the file.

    `do_sample` absent counts as true where a temperature is given, as the vendor's files mean it.
    """
    path = directory / FILE
    if not path.exists():
        return SamplingParams()
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES >> 20} MiB, not a {FILE}")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); download it again") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds a JSON {type(raw).__name__}, expected an object")
    values = {key: raw[key] for key in _KEYS if raw.get(key) is not None}
    values.setdefault("temperature", 1.0)
    if raw.get("do_sample", "temperature" in raw) is False:
        values["temperature"] = 0.0
    try:
        return SamplingParams(**values)
    except RequestError as error:
        raise ConfigError(f"{path}: {error}") from None


def write_generation_config(directory: Path, config: ModelConfig, defaults: SamplingParams) -> None:
    """Write the defaults in the form `transformers` reads."""
    values: dict[str, Any] = {"do_sample": defaults.temperature > 0}
    if defaults.temperature > 0:
        values |= {key: getattr(defaults, key) for key in ("temperature", "top_k", "top_p", "min_p")}
    if defaults.repetition_penalty != 1:
        values["repetition_penalty"] = defaults.repetition_penalty
    values["eos_token_id"] = list(config.eos_token_ids)
    values["pad_token_id"] = config.pad_token_id
    write_atomic(directory / FILE, json.dumps(values, indent=2) + "\n")
