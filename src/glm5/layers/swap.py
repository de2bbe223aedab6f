"""Puts packed layers into a model on the meta device and fills them, from packed files or while loading.

Which layers are packed is asked by the module's name on disk; everything else of the model is read
as always (`glm5.checkpoint.reading`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from glm5.checkpoint.names import disk_name
from glm5.disk.shards import ShardIndex
from glm5.errors import CheckpointError
from glm5.formats import CompressedTensors, Format
from glm5.formats.packing import BITS
from glm5.kernels import cpu
from glm5.layers.fused_layer import NativeDecoderLayer
from glm5.layers.native_attention import NativeAttention
from glm5.layers.packed import (
    PROJECTIONS,
    NativeLinear,
    NativeNorm,
    Packed,
    PackedEmbedding,
    PackedExperts,
    PackedLinear,
    PackedMixture,
    PackedMLP,
    Scheme,
    TiedHead,
)
from glm5.layers.torch_cpu import Linear
from glm5.model.attention import MultiHeadLatentAttention
from glm5.model.moe import MLP, MixtureOfExperts
from glm5.model.norms import RMSNorm
from glm5.model.transformer import DecoderLayer, GlmForCausalLM

_SCALES = (torch.bfloat16, torch.float16, torch.float32)
SchemeOf = Callable[[str], Scheme | None]


class PackedWeight(NamedTuple):
    """A packed weight of a model: its name on disk, and how to reach its memory once it has some."""

    name: str  # "model.layers.3.mlp.experts.7.gate_proj.weight"
    shape: tuple[int, int]
    scheme: Scheme
    memory: Callable[[], Packed]


def pack_modules(model: GlmForCausalLM, scheme_of: SchemeOf) -> list[PackedWeight]:
    """Swap every layer that `scheme_of(module name on disk)` gives a scheme; returns what to fill.

    The experts of a layer must agree. Layers that no whole groups fill stay floats.
    """
    found: list[PackedWeight] = []
    for path, module in list(model.named_modules()):
        if isinstance(module, MixtureOfExperts):
            experts = _packed_experts(model, path, module, scheme_of)
            if experts is not None:
                shared = module.shared_experts
                _set(model, path, PackedMixture(module, experts, shared))
                found += _expert_weights(_disk_module(model, f"{path}.experts"), experts)
    for path, module in list(model.named_modules()):
        if isinstance(module, Linear):
            name = _disk_module(model, path)
            scheme = scheme_of(name)
            if scheme is not None and _fits(module.in_features, scheme):
                layer = PackedLinear(module.in_features, module.out_features, scheme)
                layer.bias = module.bias
                _set(model, path, layer)
                shape = (module.out_features, module.in_features)
                found.append(PackedWeight(f"{name}.weight", shape, scheme, _memory_of(layer)))
    found += _packed_embedding(model, scheme_of)
    for path, module in list(model.named_modules()):
        layers = [getattr(module, name, None) for name in PROJECTIONS]
        if type(module) is MLP and all(isinstance(layer, PackedLinear) for layer in layers):
            _set(model, path, PackedMLP(*layers))  # type: ignore[arg-type]
    return found


def place_modules(model: GlmForCausalLM, device: torch.device) -> None:
    """Give packed layers memory; the float layers beside them go through the native kernels too."""
    for module in model.modules():
        if isinstance(module, PackedEmbedding):
            module.place_as(model.model.norm.weight)
        elif isinstance(module, (PackedLinear, PackedExperts)):
            module.place(device)
        elif type(module) is Linear and device.type == "cpu":
            NativeLinear.of(module)
        elif type(module) is RMSNorm and device.type == "cpu":
            NativeNorm.of(module)
        elif type(module) is MultiHeadLatentAttention and device.type in ("cpu", "cuda"):
            NativeAttention.of(module)
    for module in list(model.modules()):
        if isinstance(module, DecoderLayer) and device.type == "cpu":
            NativeDecoderLayer.of(module)


def is_packed(model: nn.Module) -> bool:
    return any(isinstance(module, (PackedLinear, PackedExperts)) for module in model.modules())


def _memory_of(layer: PackedLinear) -> Callable[[], Packed]:
    return lambda: Packed(layer.words, layer.scales)


def _packed_embedding(model: GlmForCausalLM, scheme_of: SchemeOf) -> list[PackedWeight]:
    """Swap the embedding, and a head that has no matrix of its own."""
    table, name = model.model.embed_tokens, "model.embed_tokens"
    scheme = scheme_of(name)
    if scheme is None or not _fits(table.embedding_dim, scheme):
        return []
    embedding = PackedEmbedding(table.num_embeddings, table.embedding_dim, scheme)
    model.model.embed_tokens = embedding  # type: ignore[assignment]
    if model.config.tie_word_embeddings and not isinstance(model.lm_head, PackedLinear):
        model.lm_head = TiedHead(embedding)  # type: ignore[assignment]
    shape = (table.num_embeddings, table.embedding_dim)
    return [PackedWeight(f"{name}.weight", shape, scheme, _memory_of(embedding))]


def _packed_experts(
    model: GlmForCausalLM, path: str, mixture: MixtureOfExperts, scheme_of: SchemeOf
) -> PackedExperts | None:
    bank = mixture.experts
    count, hidden, width = bank.down_proj.shape
    name = _disk_module(model, f"{path}.experts")
    schemes = {
        scheme_of(f"{name}.{expert}.{projection}") for expert in range(count) for projection in PROJECTIONS
    }
    if schemes == {None}:
        return None
    if len(schemes) != 1:
        raise CheckpointError(f"{name}: its experts are stored in different ways, which glm5 does not read")
    scheme = schemes.pop()
    assert scheme is not None
    fits = _fits(hidden, scheme) and _fits(width, scheme)
    return PackedExperts(count, hidden, width, scheme) if fits else None


def _expert_weights(name: str, experts: PackedExperts) -> Iterator[PackedWeight]:
    for expert in range(experts.num_experts):
        for projection in PROJECTIONS:
            yield PackedWeight(
                f"{name}.{expert}.{projection}.weight", experts.shape(projection), experts.scheme,
                _expert_memory(experts, expert, projection),
            )  # fmt: skip


def _expert_memory(experts: PackedExperts, expert: int, projection: str) -> Callable[[], Packed]:
    return lambda: experts.packed(expert, projection)


def _fits(columns: int, scheme: Scheme) -> bool:
    return scheme.group % 32 == 0 and columns % scheme.group == 0


def _disk_module(model: GlmForCausalLM, path: str) -> str:
    return disk_name(f"{path}.", model.config).removesuffix(".")


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def stored_scheme(form: Format | None, index: ShardIndex) -> SchemeOf:
    """The scheme of a module whose codes the native kernels can use as they are stored; else None."""

    def scheme_of(module: str) -> Scheme | None:
        words, scales = f"{module}.weight_packed", f"{module}.weight_scale"
        if not isinstance(form, CompressedTensors) or words not in index or scales not in index:
            return None
        group = form.group_of(module)
        if group is None or group.type != "int" or group.bits not in BITS or not group.symmetric:
            return None
        dtype = index[scales].dtype
        others = any(f"{module}.{name}" in index for name in ("weight_g_idx", "weight_zero_point"))
        rows, columns = form.shape(f"{module}.weight", index)
        across = index[scales].shape[-1]
        if others or dtype not in _SCALES or columns % 32 or columns % across or columns // across % 32:
            return None
        return Scheme(group.bits, columns // across, dtype) if index[scales].shape == (rows, across) else None

    return scheme_of


def fill_packed(weight: PackedWeight, index: ShardIndex) -> None:
    """Read a stored packed weight straight into its place."""
    module = weight.name.removesuffix(".weight")
    memory = weight.memory()
    for suffix, target in (("weight_packed", memory.words), ("weight_scale", memory.scales)):
        name = f"{module}.{suffix}"
        if target.device.type == "cpu":
            index.file(name).read_into(name, target)
        else:
            target.copy_(index.file(name).read(name))
    scales = memory.scales
    if not (cpu.all_finite(scales) if scales.device.type == "cpu" else bool(scales.isfinite().all())):
        name = f"{module}.weight_scale"
        raise CheckpointError(
            f"{index.file(name).path}: {name} holds a NaN or infinite scale; download it again"
        )


def round_into(weight: PackedWeight, values: Tensor, where: Path) -> None:
    """Quantize float values [out, in] into a packed weight's place."""
    rounded = round_finite(values.contiguous(), weight.scheme, weight.name, where)
    memory = weight.memory()
    memory.words.copy_(rounded.words)
    memory.scales.copy_(rounded.scales)


def round_finite(values: Tensor, scheme: Scheme, name: str, where: Path) -> cpu.Rounded:
    """`cpu.round_weights`, or a CheckpointError that names the weight when it is not finite."""
    rounded = cpu.round_weights(values, bits=scheme.bits, group=scheme.group)
    if not math.isfinite(rounded.energy):
        raise CheckpointError(f"{where}: {name} holds an infinite weight or NaN and cannot be quantized")
    return rounded
