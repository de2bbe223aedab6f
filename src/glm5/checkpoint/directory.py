"""A checkpoint directory, opened once and handed on: config, index, formats, sizes, generation defaults."""

from __future__ import annotations

import hashlib
import logging
from functools import cached_property
from pathlib import Path
from reprlib import repr as cut
from typing import Any

import torch

from glm5.checkpoint import names
from glm5.checkpoint.weights import StoredWeights
from glm5.config import ModelConfig
from glm5.disk.json_file import read_json
from glm5.disk.shards import CONFIG_FILE, ShardIndex
from glm5.disk.staged import refuse_interrupted
from glm5.errors import CheckpointError, ConfigError
from glm5.formats import formats_of
from glm5.formats.plain import FLOATS

logger = logging.getLogger(__name__)

GENERATION_FILE = "generation_config.json"
# Far past any model (GLM-5 has 2^40); torch cannot even describe much larger ones.
MAX_PARAMETERS = 1 << 48
_SAMPLES, _SAMPLE_BYTES = 64, 64


class Checkpoint:
    """What a directory holds, from its headers alone. Nothing is read before it is asked for.

    Raises:
        ConfigError: `config.json` cannot be used.
        CheckpointError: a save was cut off here; shards or index are damaged (when they are asked for).
    """

    def __init__(self, directory: Path, config: ModelConfig | None = None) -> None:
        """config: in place of the directory's own."""
        refuse_interrupted(directory)
        self.directory = directory
        self.stated_config = config or ModelConfig.from_pretrained(directory)
        if self.stated_config.total_params(mtp=True) > MAX_PARAMETERS:
            raise ConfigError(
                f"{directory / CONFIG_FILE}: asks for more than 2^48 parameters; check its sizes"
            )

    @cached_property
    def index(self) -> ShardIndex:
        return ShardIndex(self.directory)

    @cached_property
    def config(self) -> ModelConfig:
        """The config of what is there: `transformers` drops the MTP layer when it saves and counts one on."""
        config = self.stated_config
        if config.num_nextn_predict_layers and not any(names.is_mtp(n, config) for n in self.index.names):
            logger.info(
                "%s: has no MTP layer although config.json counts one; loaded without", self.directory
            )
            return config.with_changes(num_nextn_predict_layers=0)
        return config

    @cached_property
    def weights(self) -> StoredWeights:
        """The logical weights, however they are stored."""
        formats = formats_of(self.quantization, self.directory / CONFIG_FILE)
        return StoredWeights(self.directory, self.index, formats, self.config)

    @property
    def quantization(self) -> dict[str, Any]:
        """`quantization_config`, {} without one."""
        settings = self.stated_config.extra.get("quantization_config") or {}
        if not isinstance(settings, dict):
            raise CheckpointError(
                f"{self.directory / CONFIG_FILE}: quantization_config is {cut(settings)}, not an object"
            )
        return settings

    @property
    def is_packed(self) -> bool:
        """Are weights stored as the packed integers that the kernels compute with?"""
        return any(name.endswith(".weight_packed") for name in self.index.names)

    @cached_property
    def generation(self) -> dict[str, Any]:
        """The object in `generation_config.json`, {} without the file."""
        path = self.directory / GENERATION_FILE
        return read_json(path, error=ConfigError) if path.exists() else {}

    @property
    def float_dtype(self) -> torch.dtype:
        """The dtype most float weights are stored in; bf16 for FP8, fp32 for fp64."""
        found = self.index.bytes_by_dtype()
        largest = next((name for name in found if name in (*FLOATS, "F8_E4M3")), "BF16")
        names = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16}
        return names.get(largest, torch.bfloat16)

    @cached_property
    def fingerprint(self) -> str:
        """Names this checkpoint by its content: the config, the first 64 KiB and samples of every shard.

        A copy has the same one. Two models that differ in a few weights only may share it by bad luck.
        """
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr(self.stated_config.to_dict()).encode())
        for path in sorted({self.index.file(name).path for name in self.index.names}, key=lambda p: p.name):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(min(size, 1 << 16)))
                for sample in range(_SAMPLES):
                    file.seek(size * sample // _SAMPLES)
                    digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()
