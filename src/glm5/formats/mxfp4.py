"""MXFP4 as `quant_method: mxfp4`, and as AMD's Quark writes it (`quant_method: quark`).

Either `weight` [out, in / 2] and `weight_scale` [out, in / 32], or `weight_blocks`
[out, in / 32, 16] and `weight_scales`; uint8 all of them. The banks of gpt-oss (all experts of a
layer in one tensor, gate and up interleaved) are not read.
"""

from __future__ import annotations

from glm5.formats.format import CodedFormat, Weight
from glm5.formats.fp4 import MX_GROUP, mxfp4
from glm5.formats.parts import Parts
from glm5.formats.settings import Settings


class Mxfp4(CodedFormat):
    def __init__(self, settings: Settings) -> None:
        if settings.choice("quant_method", ("mxfp4", "quark"), "mxfp4") == "quark":
            _check_quark(settings)

    def suffixes(self, parts: Parts) -> tuple[str, ...] | None:
        if parts.has("weight_blocks"):
            return "weight_blocks", "weight_scales", "weight"
        if parts.dtype("weight") == "U8":
            return "weight", "weight_scale", "input_scale", "output_scale"
        return None

    def checked(self, parts: Parts) -> Weight:
        if not parts.has("weight_blocks"):
            return mxfp4(parts, "weight", "weight_scale")
        if parts.has("weight"):
            raise parts.refuse("weight", "is stored a second time as weight_blocks")
        return mxfp4(parts, "weight_blocks", "weight_scales")


def _check_quark(settings: Settings) -> None:
    """Quark has many schemes; only this one, without rotated or smoothed weights, is MXFP4."""
    for key in ("algo_config", "layer_quant_config", "layer_type_quant_config"):
        if settings.values.get(key):
            raise settings.refuse(key, "Quark's MXFP4 without further settings")
    weight = settings.section("global_quant_config").section("weight")
    weight.choice("dtype", ("fp4",))
    weight.choice("qscheme", ("per_group",), "per_group")
    weight.choice("scale_format", ("e8m0",))
    weight.whole("group_size", MX_GROUP, MX_GROUP)
