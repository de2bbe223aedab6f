"""The shape of a model: `ModelConfig`, its checks and the published sizes."""

from __future__ import annotations

from glm5.config.model_config import MAX_CONFIG_BYTES, MODEL_TYPES, ModelConfig

__all__ = ["MAX_CONFIG_BYTES", "MODEL_TYPES", "ModelConfig"]
