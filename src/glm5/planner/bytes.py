"""The count of memory that everything else asks: weights as they will lie, and a cache's bytes.

From headers and the config alone. What loads a model obeys the same rules (`glm5.layers.swap`); a test holds
the two together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from glm5.checkpoint import names
from glm5.checkpoint.directory import Checkpoint
from glm5.checkpoint.filling import stored_scheme
from glm5.config import ModelConfig
from glm5.formats.packed import PROJECTIONS, Scheme
from glm5.model.transformer import GlmForCausalLM

SchemeOf = Callable[[str], Scheme | None]


@dataclass(frozen=True)
class WeightBytes:
    """Bytes in memory of a model's parts, the MTP layers among them."""

    dense: int  # what every token passes: attention, norms, routers, shared experts, dense layers
    experts: int  # routed experts
    embedding: int
    head: int  # 0 when it is the embedding's matrix

    @property
    def total(self) -> int:
        return self.dense + self.experts + self.embedding + self.head


def weight_bytes(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, scheme_of: SchemeOf | None = None
) -> WeightBytes:
    """What `load_model` with the same arguments takes.

    dtype: of the float weights; None = two bytes a weight, or four where most are stored in fp32 or fp64.
    scheme_of: the scheme of each module that is rounded while loading; None = codes as they are stored.
    """
    config = checkpoint.config
    itemsize = (checkpoint.float_dtype if dtype is None else dtype).itemsize
    scheme_of = scheme_of or stored_scheme(checkpoint)
    with torch.device("meta"):
        model = GlmForCausalLM(config)
    found = dict.fromkeys(("dense", "experts", "embedding", "head"), 0)
    for name, tensor in names.state_tensors(model).items():
        disk = names.disk_name(name, config)
        if name.endswith(".mlp.experts.gate_up_proj"):
            bank = disk.removesuffix(".gate_up_proj")
            experts, hidden, width = tensor.shape[0], tensor.shape[2], tensor.shape[1] // 2
            schemes = {part: scheme_of(f"{bank}.0.{part}") for part in PROJECTIONS}
            shapes = {
                part: (hidden, width) if part == "down_proj" else (width, hidden) for part in PROJECTIONS
            }
            packs = all(s is not None and s.fits(hidden) and s.fits(width) for s in schemes.values())
            each = sum(_matrix(shapes[p], schemes[p] if packs else None, itemsize) for p in PROJECTIONS)
            found["experts"] += experts * (-(-each // 64) * 64 if packs else each)
        elif not name.endswith(".mlp.experts.down_proj"):
            part = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}.get(name, "dense")
            scheme = (
                scheme_of(disk.removesuffix(".weight")) if tensor.dim() == 2 and _may_pack(name) else None
            )
            size = 4 if name.endswith("e_score_correction_bias") else itemsize
            found[part] += _matrix(tuple(tensor.shape), scheme, size)
    return WeightBytes(**found)


def cache_bytes_per_token(config: ModelConfig, dtype: torch.dtype, layers: range | None = None) -> int:
    """Bytes that one token of one sequence takes in the caches of these layers; None = the decoder's."""
    values = 0
    for layer in range(config.num_hidden_layers) if layers is None else layers:
        if config.uses_mla:
            values += (config.kv_lora_rank or 0) + config.qk_rope_head_dim
        else:
            values += 2 * config.num_key_value_heads * config.attention_head_dim
        if config.has_indexer(layer):
            values += config.index_head_dim
    return values * dtype.itemsize


def _may_pack(name: str) -> bool:
    return not name.endswith((".gate.weight", "norm.weight"))


def _matrix(shape: tuple[int, ...], scheme: Scheme | None, itemsize: int) -> int:
    if scheme is not None and len(shape) == 2 and scheme.fits(shape[1]):
        return scheme.num_bytes(*shape)
    count = 1
    for extent in shape:
        count *= extent
    return count * itemsize
