"""bf16, fp16, FP8 or others' quantised checkpoints to int4 that streams: a tensor at a time, resumable.

`quantise` is the verb; a `Recipe` says which module gets how many bits.
"""

from __future__ import annotations

from glm5.quantize.directory import quantise
from glm5.quantize.recipe import Recipe, widest_group

__all__ = ["Recipe", "quantise", "widest_group"]
