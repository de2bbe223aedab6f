"""`quant_method: modelopt`, as NVIDIA's Model Optimizer writes it: NVFP4, FP8 or both in one model.

The stored dtype tells which of the two a weight is: nvidia/GLM-5.3-NVFP4 has experts in NVFP4 and
three dense layers in FP8.
"""

from __future__ import annotations

from glm5.formats.block_fp8 import block_fp8
from glm5.formats.decoding import grid_shape
from glm5.formats.format import CodedFormat, Weight
from glm5.formats.fp4 import NVFP4_GROUP, nvfp4
from glm5.formats.fp8 import BLOCK
from glm5.formats.fp8_scales import scaled_fp8
from glm5.formats.parts import SCALAR, Parts
from glm5.formats.settings import Settings

METHODS = ("modelopt", "modelopt_fp4", "modelopt_mixed")
_ALGORITHMS = ("NVFP4", "W4A16_NVFP4", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")
_SMOOTHING = "pre_quant_scale"
_PARTS = ("weight", "weight_scale", "weight_scale_2", "weight_scale_inv", "input_scale", "output_scale",
          "k_scale", "v_scale", _SMOOTHING)  # fmt: skip


class ModelOpt(CodedFormat):
    def __init__(self, settings: Settings) -> None:
        if "quant_algo" not in settings and "quantization" in settings:
            settings = settings.section("quantization")  # as in hf_quant_config.json
        settings.choice("quant_algo", (*_ALGORITHMS, "MIXED_PRECISION"))
        for part in (settings, *(layer for _, layer in settings.section("quantized_layers").sections())):
            part.choice("quant_algo", (*_ALGORITHMS, "MIXED_PRECISION"))
            if "NVFP4" in str(part.values["quant_algo"]).upper():
                part.whole("group_size", NVFP4_GROUP, NVFP4_GROUP, NVFP4_GROUP)

    def suffixes(self, parts: Parts) -> tuple[str, ...] | None:
        return _PARTS if parts.dtype("weight") in ("U8", "F8_E4M3") else None

    def checked(self, parts: Parts) -> Weight:
        if parts.has(_SMOOTHING):
            raise parts.refuse(
                _SMOOTHING,
                "scales the input of this layer, which glm5 does not do",
                "get a copy quantized without AWQ",
            )
        if parts.dtype("weight") == "U8":
            return nvfp4(parts, "weight", "weight_scale_2", reciprocal=False)
        if parts.has("weight_scale_inv"):
            return block_fp8(parts, (BLOCK, BLOCK))
        return self._fp8(parts)

    def _fp8(self, parts: Parts) -> Weight:
        """One scale, or one a row, or one a block of 128 x 128; its shape tells which."""
        rows, columns = shape = parts.matrix("weight", "F8_E4M3")
        down, across = grid_shape(shape, (BLOCK, BLOCK))
        found = parts.info("weight_scale").shape
        if len(found) == 4:
            return scaled_fp8(parts, (BLOCK, BLOCK), (down, across), (down, 1, across, 1))
        if found in SCALAR:
            return scaled_fp8(parts, (max(rows, 1), max(columns, 1)), (1, 1), *SCALAR)
        return scaled_fp8(
            parts, (1, max(columns, 1)), (rows, 1), (rows,), (rows, 1), (), (down, 1, across, 1)
        )
