"""The shape of a model: `ModelConfig`, its checks and the published sizes."""

from __future__ import annotations

from glm5.config.model_config import MODEL_TYPES, ModelConfig

__all__ = ["MODEL_TYPES", "ModelConfig"]
