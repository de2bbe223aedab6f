"""Checkpoint directories in and out: the Hugging Face layout, bf16/fp16/fp32 and official FP8.

`load_model` and `save_model` are the verbs; `ShardIndex` answers what a directory holds without
reading a weight.
"""

from __future__ import annotations

from glm5.checkpoint.reading import load_model
from glm5.checkpoint.writing import save_model
from glm5.disk.shards import ShardIndex

__all__ = ["ShardIndex", "load_model", "save_model"]
