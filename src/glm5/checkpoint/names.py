"""The only place that knows how our parameters are called in published checkpoints.

Ours differ in two things: the experts of a layer are one tensor (on disk: one per expert and projection), and
the MTP layers are `mtp.k`, a decoder layer of theirs `mtp.k.layer` (on disk both `model.layers.{depth + k}`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from glm5.config import ModelConfig
from glm5.model.transformer import GlmForCausalLM


class Piece(NamedTuple):
    """A tensor on disk and where it lies in the model: `parameter` itself or a part of it."""

    name: str  # on disk
    parameter: str  # in the model
    part: tuple[int | slice, ...]  # index into the parameter; () is all of it

    def of(self, tensor: Tensor) -> Tensor:
        return tensor[self.part] if self.part else tensor


class BankPart(NamedTuple):
    """An expert's matrix within the bank of its layer, as `transformers` saves some models: a run of rows."""

    bank: str  # on disk
    shape: tuple[int, int, int]  # of the bank: experts, rows, columns
    expert: int
    rows: slice


_CODES = (".words", ".scales", ".bytes")  # as the packed layers call them
_EXPERT = re.compile(r"(model\.layers\.[0-9]{1,6}\.mlp\.experts)\.([0-9]{1,9})\.(gate|up|down)_proj\.weight")


def state_tensors(model: GlmForCausalLM) -> dict[str, Tensor]:
    """Float parameters and saved buffers by our names; a tied head and packed codes are left out."""
    state = model.state_dict(keep_vars=True)
    tensors = {name: tensor for name, tensor in state.items() if not name.endswith(_CODES)}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def pieces(model: GlmForCausalLM) -> Iterator[Piece]:
    """Every tensor of the checkpoint in layer order; an expert's gate, up, down side by side."""
    config = model.config
    tensors = state_tensors(model)
    for name, tensor in tensors.items():
        if name.endswith(".mlp.experts.gate_up_proj"):
            yield from _expert_pieces(disk_name(name, config), name, tensor.shape[0], tensor.shape[1] // 2)
        elif not name.endswith(".mlp.experts.down_proj"):
            yield Piece(disk_name(name, config), name, ())


def _expert_pieces(disk: str, name: str, experts: int, width: int) -> Iterator[Piece]:
    bank = disk.removesuffix(".gate_up_proj")
    down = name.removesuffix("gate_up_proj") + "down_proj"
    for expert in range(experts):
        yield Piece(f"{bank}.{expert}.gate_proj.weight", name, (expert, slice(0, width)))
        yield Piece(f"{bank}.{expert}.up_proj.weight", name, (expert, slice(width, 2 * width)))
        yield Piece(f"{bank}.{expert}.down_proj.weight", down, (expert,))


def disk_name(name: str, config: ModelConfig) -> str:
    """`mtp.0.layer.mlp.gate.weight` is `model.layers.78.mlp.gate.weight` on disk."""
    match = re.fullmatch(r"mtp\.(\d+)\.(?:layer\.)?(.+)", name)
    if not match:
        return name
    return f"model.layers.{config.num_hidden_layers + int(match[1])}.{match[2]}"


def bank_part(name: str, config: ModelConfig) -> BankPart | None:
    """Where an expert's matrix lies in files that store a layer's experts as one tensor; None = no expert."""
    match = _EXPERT.fullmatch(name)
    if not match:
        return None
    experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    if match[3] == "down":
        return BankPart(f"{match[1]}.down_proj", (experts, hidden, width), int(match[2]), slice(0, hidden))
    rows = slice(0, width) if match[3] == "gate" else slice(width, 2 * width)
    return BankPart(f"{match[1]}.gate_up_proj", (experts, 2 * width, hidden), int(match[2]), rows)


def is_mtp(name: str, config: ModelConfig) -> bool:
    """Whether a tensor on disk belongs to an MTP layer."""
    match = re.match(r"model\.layers\.([0-9]{1,6})\.", name)
    return match is not None and int(match[1]) >= config.num_hidden_layers


_CACHE_SCALE = re.compile(
    r"\.self_attn\.(attn\.)?([qkv]_(proj\.)?)?([qkv]_)?(scale|zero_point)$|\.kv_cache_scale$"
)
_INDEXER = re.compile(r"model\.layers\.([0-9]{1,6})\.self_attn\.indexer\.")


def is_borrowed(name: str, config: ModelConfig) -> bool:
    """A weight that no reader needs: what the model has already, or what others keep beside it.

    MTP embeddings and head, a tied head, the rotary table; scales of another engine's KV cache; indexers of
    layers that share another's choice.
    """
    if name == "lm_head.weight":
        return config.tie_word_embeddings
    if name.endswith(".rotary_emb.inv_freq") or _CACHE_SCALE.search(name):
        return True
    shared = _INDEXER.match(name)
    if shared and int(shared[1]) < config.num_hidden_layers and not config.has_indexer(int(shared[1])):
        return True
    return is_mtp(name, config) and name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))
