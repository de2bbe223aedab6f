"""Checkpoint directories in and out: the Hugging Face layout, in every form that `glm5.formats` knows.

`Checkpoint` is a directory opened once; `plan_reads` and `fill` go from it to memory; `save_model` writes
one.
"""

from __future__ import annotations

from glm5.checkpoint.directory import Checkpoint
from glm5.checkpoint.writing import save_model
from glm5.disk.shards import ShardIndex

__all__ = ["Checkpoint", "ShardIndex", "save_model"]
