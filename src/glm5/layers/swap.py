"""What each part of a model is made of where it runs: one table, one walk, modules replaced from outside.

A part is a linear layer, a norm, the embedding, a bank of experts or a whole decoder layer; how its weights
are stored and the device decide what takes its place. What is not in the table stays as the paper has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from glm5.checkpoint.filling import SchemeOf, Target
from glm5.checkpoint.names import disk_name, pieces, state_tensors
from glm5.errors import CheckpointError
from glm5.formats.packed import PROJECTIONS, Packed
from glm5.kernels.memory import empty_weights
from glm5.layers.bucketed_experts import BucketedBank, is_small
from glm5.layers.fused_layer import FusedLayer, can_fuse
from glm5.layers.gpu_layer import GpuLayer, can_run_on_gpu
from glm5.layers.native import NativeExperts, NativeLinear, NativeNorm
from glm5.layers.packed import PackedEmbedding, PackedExperts, PackedLinear, TiedHead
from glm5.model.layer import DecoderLayer
from glm5.model.linear import Linear
from glm5.model.moe import ExpertBank
from glm5.model.norms import RMSNorm
from glm5.model.transformer import GlmForCausalLM

# (kind of part, device) -> what takes the place of a part with float weights.
FLOAT_PARTS: dict[tuple[type[nn.Module], str], Callable[..., nn.Module]] = {
    (Linear, "cpu"): NativeLinear,
    (RMSNorm, "cpu"): NativeNorm,
    (ExpertBank, "cpu"): NativeExperts,
}
# device -> (what takes the place of a whole layer, for which layers)
WHOLE_LAYERS: dict[str, tuple[Callable[[DecoderLayer], nn.Module], Callable[[DecoderLayer], bool]]] = {
    "cpu": (FusedLayer, can_fuse),
    "cuda": (GpuLayer, can_run_on_gpu),
}


def swap(model: GlmForCausalLM, device: torch.device, scheme_of: SchemeOf | None = None) -> list[Target]:
    """Replace every part that the table knows; returns what a checkpoint has to fill.

    The model may lie on the meta device; `materialize` gives it memory. scheme_of: the scheme of a module (by
    its name on disk) whose weight is packed. The experts of a layer must agree; what whole groups do not
    fill stays floats.
    """
    packed = _pack(model, scheme_of) if scheme_of is not None else []
    for path, module in list(model.named_modules()):
        make = FLOAT_PARTS.get((type(module), device.type))
        if make is not None:
            _set(model, path, make(module))
    if model.config.tie_word_embeddings and isinstance(model.lm_head, NativeLinear):
        model.lm_head.weight = model.model.embed_tokens.weight
    if device.type in WHOLE_LAYERS:
        make_layer, applies = WHOLE_LAYERS[device.type]
        for path, module in list(model.named_modules()):
            if type(module) is DecoderLayer and applies(module):
                _set(model, path, make_layer(module))
    return [*_float_targets(model), *packed]


def swap_for_training(model: GlmForCausalLM) -> None:
    """Banks of small experts become a few batched products; everything else trains as the paper has it."""
    for path, module in list(model.named_modules()):
        if type(module) is ExpertBank and is_small(module):
            _set(model, path, BucketedBank(module))


def materialize(model: GlmForCausalLM, dtype: torch.dtype, device: torch.device) -> None:
    """Give every part memory (large pages where there are), not written yet."""
    seen: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in seen:  # a tied head shares one parameter
                values = empty_weights(tuple(parameter.shape), dtype, device)
                seen[id(parameter)] = nn.Parameter(values)
            setattr(module, name, seen[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))
    for module in model.modules():
        if isinstance(module, PackedEmbedding):
            module.reserve_like(model.model.norm.weight)
        elif isinstance(module, PackedLinear | PackedExperts):
            module.reserve(device)


def _float_targets(model: GlmForCausalLM) -> Iterator[Target]:
    """Every float tensor of the checkpoint, where it lies in the model."""
    shapes = {name: tensor.shape for name, tensor in state_tensors(model).items()}
    tensors: dict[str, Tensor] = {}

    def memory(parameter: str) -> Tensor:
        if not tensors:
            tensors.update(state_tensors(model))
        return tensors[parameter]

    for piece in pieces(model):
        shape = piece.of(torch.empty(shapes[piece.parameter], device="meta")).shape
        yield Target(piece.name, tuple(shape), lambda piece=piece: piece.of(memory(piece.parameter)))  # type: ignore[misc]


def _pack(model: GlmForCausalLM, scheme_of: SchemeOf) -> list[Target]:
    found: list[Target] = []
    for path, module in list(model.named_modules()):
        if isinstance(module, ExpertBank):
            experts = _packed_experts(model, path, module, scheme_of)
            if experts is not None:
                _set(model, path, experts)
                found += _expert_targets(_disk_module(model, path), experts)
        elif isinstance(module, Linear):
            name = _disk_module(model, path)
            tied = name == "lm_head" and model.config.tie_word_embeddings
            scheme = None if tied else scheme_of(name)
            if scheme is not None and scheme.fits(module.in_features):
                layer = PackedLinear(module.in_features, module.out_features, scheme, module.bias)
                _set(model, path, layer)
                shape = (module.out_features, module.in_features)
                found.append(Target(f"{name}.weight", shape, layer.packed, scheme))
    return found + _packed_embedding(model, scheme_of)


def _packed_embedding(model: GlmForCausalLM, scheme_of: SchemeOf) -> list[Target]:
    """Replace the embedding, and a head that has no matrix of its own."""
    table, name = model.model.embed_tokens, "model.embed_tokens"
    scheme = scheme_of(name)
    if scheme is None or not scheme.fits(table.embedding_dim):
        return []
    embedding = PackedEmbedding(table.num_embeddings, table.embedding_dim, scheme)
    model.model.embed_tokens = embedding  # type: ignore[assignment]
    if model.config.tie_word_embeddings and not isinstance(model.lm_head, PackedLinear):
        model.lm_head = TiedHead(embedding)  # type: ignore[assignment]
    shape = (table.num_embeddings, table.embedding_dim)
    return [Target(f"{name}.weight", shape, embedding.packed, scheme)]


def _packed_experts(
    model: GlmForCausalLM, path: str, bank: ExpertBank, scheme_of: SchemeOf
) -> PackedExperts | None:
    count, hidden, width = bank.down_proj.shape
    name = _disk_module(model, path)
    schemes = {scheme_of(f"{name}.{expert}.{part}") for expert in range(count) for part in PROJECTIONS}
    if schemes == {None}:
        return None
    if len(schemes) != 1:
        raise CheckpointError(f"{name}: its experts are stored in different ways, which glm5 does not read")
    scheme = schemes.pop()
    assert scheme is not None
    fits = scheme.fits(hidden) and scheme.fits(width)
    return PackedExperts(count, hidden, width, scheme) if fits else None


def _expert_targets(name: str, experts: PackedExperts) -> Iterator[Target]:
    for expert in range(experts.num_experts):
        for projection in PROJECTIONS:
            memory: Callable[[], Packed] = lambda e=expert, p=projection: experts.packed(e, p)  # type: ignore[misc]  # noqa: E731
            yield Target(
                f"{name}.{expert}.{projection}.weight", experts.shape(projection), memory, experts.scheme
            )


def _disk_module(model: GlmForCausalLM, path: str) -> str:
    return disk_name(f"{path}.", model.config).removesuffix(".")


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
