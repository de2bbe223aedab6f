"""bf16, fp16, FP8 or others' quantized checkpoints to int4 that streams: a tensor at a time, resumable.

`quantize` is the verb; a `Recipe` says which module gets how many bits, a `Calibration` what text the
layers see while they are rounded (GPTQ).
"""

from __future__ import annotations

from glm5.quantize.calibration import Calibration
from glm5.quantize.directory import quantize
from glm5.quantize.recipe import Recipe, widest_group

__all__ = ["Calibration", "Recipe", "quantize", "widest_group"]
