"""The MTP layer of a native model, prepared for guessing."""

from __future__ import annotations

from typing import Any

from torch import nn

from glm5.kernels import cpu
from glm5.layers.exact import rows_are_exact
from glm5.layers.fused_layer import FusedLayer
from glm5.layers.native import NativeLinear
from glm5.layers.packed import PackedEmbedding, PackedLinear, TiedHead
from glm5.model.transformer import GlmForCausalLM


def draft_calls(model: GlmForCausalLM, most: int) -> cpu.DraftCalls | None:
    """The calls around the first MTP layer; None where a part of it is not the library's.

    They are kept with the layer, and made anew when its memory may have moved.
    """
    mtp: Any = model.mtp_layers()[0] if model.mtp else None
    if mtp is None or not isinstance(mtp.layer, FusedLayer):
        return None
    found: cpu.DraftCalls | None = mtp.layer.kept(f"draft {most}", lambda: (_made(model, mtp, most),))[0]
    return found


def _made(model: GlmForCausalLM, mtp: Any, most: int) -> cpu.DraftCalls | None:
    if not rows_are_exact(model):
        return None
    embedding, head = _matrix(model.model.embed_tokens), _matrix(model.lm_head)
    join = _matrix(mtp.eh_proj)
    if embedding is None or head is None or join is None or mtp.eh_proj.bias is not None:
        return None
    enorm, hnorm, norm = ((n.weight, n.eps) for n in (mtp.enorm, mtp.hnorm, mtp.shared_head.norm))
    return cpu.DraftCalls(
        embedding, join, head, enorm=enorm, hnorm=hnorm, norm=norm, dtype=model.dtype, most=most
    )


def _matrix(module: nn.Module) -> cpu.Matrix | None:
    if isinstance(module, TiedHead):
        module = module.embedding
    if isinstance(module, NativeLinear | PackedLinear | PackedEmbedding):
        return module.matrix
    if isinstance(module, nn.Embedding):
        return cpu.Matrix(module.weight.detach())
    return None
