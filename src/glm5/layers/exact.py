"""Does a row of a step get the same bits whatever stands beside it?"""

from __future__ import annotations

from glm5.layers.fused_layer import FusedLayer
from glm5.layers.movable import NATIVE
from glm5.layers.native import NativeLinear
from glm5.layers.packed import PackedLinear, TiedHead
from glm5.model.transformer import GlmForCausalLM


def rows_are_exact(model: GlmForCausalLM) -> bool:
    """Where every layer and the head are the native library's; products of PyTorch depend on their size."""
    layers = [*model.model.layers, *(mtp.layer for mtp in model.mtp_layers())]
    native = all(isinstance(layer, FusedLayer) and layer.handle is not None for layer in layers)
    head = isinstance(model.lm_head, NativeLinear | PackedLinear | TiedHead)
    return native and head and model.device.type == "cpu" and model.dtype in NATIVE
