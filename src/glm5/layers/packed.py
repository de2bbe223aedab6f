"""Layers of the network made of packed integers: the same modules, other material.

They take the place of `Linear`, `MLP` and `MixtureOfExperts` in a loaded model (names and results
stay). On the CPU the native kernels compute from the codes as they lie in the file, on a GPU Triton's;
elsewhere, or where gradients are wanted, the weights are unpacked first.
Letters: E experts, D hidden, I expert width, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glm5.formats.packing import dequantize, words_per_row
from glm5.kernels import cpu, cuda
from glm5.kernels.memory import empty_weights
from glm5.layers.torch_cpu import Linear
from glm5.model.moe import MLP, MixtureOfExperts
from glm5.model.norms import RMSNorm

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_NATIVE = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Scheme:
    """Symmetric integers of `bits` with one scale a row and `group` columns."""

    bits: int = 4
    group: int = 64
    scale_dtype: torch.dtype = torch.bfloat16

    def bits_per_weight(self) -> float:
        return self.bits + 8 * self.scale_dtype.itemsize / self.group


class Packed(NamedTuple):
    """Where a packed matrix lies: words int32 [out, words], scales [out, groups]."""

    words: Tensor
    scales: Tensor


def runs_natively(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in _NATIVE and not torch.is_grad_enabled()


class Movable(nn.Module):
    """A module that forgets what it keeps by address when `.to()` gives its memory another place."""

    _kept_by_address: tuple[str, ...] = ()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for name in self._kept_by_address:
            self.__dict__.pop(name, None)
        return super()._apply(fn, recurse)


class PackedLinear(Movable):
    """y = x W^T + b with W in packed integers; `place()` gives it memory."""

    _kept_by_address = ("matrix",)

    def __init__(
        self, in_features: int, out_features: int, scheme: Scheme, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.words: Tensor
        self.scales: Tensor
        self.register_buffer("words", None, persistent=False)
        self.register_buffer("scales", None, persistent=False)

    def place(self, device: torch.device) -> Packed:
        rows, groups = self.out_features, self.in_features // self.scheme.group
        words = words_per_row(self.in_features, self.scheme.bits)
        self.words = empty_weights((rows, words), torch.int32, device)
        self.scales = empty_weights((rows, groups), self.scheme.scale_dtype, device)
        return Packed(self.words, self.scales)

    @cached_property
    def matrix(self) -> cpu.Matrix:
        scheme = self.scheme
        return cpu.Matrix(
            self.words, self.scales, bits=scheme.bits, columns=self.in_features, group=scheme.group
        )

    @property
    def weight(self) -> Tensor:
        """The unpacked matrix, fp32 [out, in], made anew at each call."""
        return dequantize(self.words, self.scales, self.scheme.bits, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if runs_natively(x):
            bias = None if self.bias is None else self.bias.float()
            return cpu.linear(x, self.matrix, bias=bias)
        if cuda.runs_here(x):
            bits, group = self.scheme.bits, self.scheme.group
            return cuda.linear(x, self.words, self.scales, bits=bits, group=group, bias=self.bias)
        return F.linear(x, self.weight.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.scheme.bits}, group={self.scheme.group}"


class PackedEmbedding(PackedLinear):
    """Token ids int64 [...] to their rows [..., D]; as a matrix it is a tied head's."""

    def __init__(self, num_embeddings: int, embedding_dim: int, scheme: Scheme) -> None:
        super().__init__(embedding_dim, num_embeddings, scheme)
        self.like: Tensor
        self.register_buffer("like", None, persistent=False)

    def place_as(self, like: Tensor) -> None:
        """Memory on the device of `like`, whose dtype the rows will have."""
        self.place(like.device)
        self.like = torch.empty(0, dtype=like.dtype, device=like.device)

    def forward(self, ids: Tensor) -> Tensor:
        words, scales = self.words[ids.flatten()], self.scales[ids.flatten()]
        rows = dequantize(words, scales, self.scheme.bits, self.in_features)
        return rows.view(*ids.shape, self.in_features).to(self.like.dtype)


class TiedHead(nn.Module):
    """Logits by the matrix of a packed embedding."""

    def __init__(self, embedding: PackedEmbedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, x: Tensor) -> Tensor:
        return PackedLinear.forward(self.embedding, x)


class PackedExperts(nn.Module):
    """All routed experts of a layer, each one run of bytes: codes and scales of gate, up, down.

    The run has the order of the checkpoint, so that a whole expert is one read and one slot.
    """

    def __init__(self, experts: int, hidden: int, width: int, scheme: Scheme) -> None:
        super().__init__()
        self.num_experts, self.hidden, self.width, self.scheme = experts, hidden, width, scheme
        self.bytes: Tensor
        self.register_buffer("bytes", None, persistent=False)

    def shape(self, projection: str) -> tuple[int, int]:
        return (self.hidden, self.width) if projection == "down_proj" else (self.width, self.hidden)

    @cached_property
    def _parts(self) -> dict[str, tuple[slice, slice]]:
        """The bytes of an expert's codes and scales, by projection."""
        parts, at = {}, 0
        for projection in PROJECTIONS:
            rows, columns = self.shape(projection)
            middle = at + rows * words_per_row(columns, self.scheme.bits) * 4
            end = middle + rows * (columns // self.scheme.group) * self.scheme.scale_dtype.itemsize
            parts[projection] = (slice(at, middle), slice(middle, end))
            at = end
        return parts

    @property
    def bytes_per_expert(self) -> int:
        return self._parts["down_proj"][1].stop

    def place(self, device: torch.device) -> None:
        stride = -(-self.bytes_per_expert // 64) * 64
        self.bytes = empty_weights((self.num_experts, stride), torch.uint8, device)

    def packed(self, expert: int, projection: str) -> Packed:
        """Views into the expert's bytes."""
        rows, columns = self.shape(projection)
        codes, scales = self._parts[projection]
        run = self.bytes[expert]
        return Packed(
            run[codes].view(torch.int32).view(rows, words_per_row(columns, self.scheme.bits)),
            run[scales].view(self.scheme.scale_dtype).view(rows, columns // self.scheme.group),
        )

    def matrices(self, expert: int) -> tuple[cpu.Matrix, cpu.Matrix, cpu.Matrix]:
        gate, up, down = (
            cpu.Matrix(
                *self.packed(expert, projection), bits=self.scheme.bits,
                columns=self.shape(projection)[1], group=self.scheme.group,
            )
            for projection in PROJECTIONS
        )  # fmt: skip
        return gate, up, down

    def weight(self, expert: int, projection: str) -> Tensor:
        return dequantize(
            *self.packed(expert, projection), bits=self.scheme.bits, columns=self.shape(projection)[1]
        )

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """On a GPU all at once; elsewhere an expert at a time, unpacked as it is needed."""
        if cuda.runs_here(x_TD):
            return cuda.experts(x_TD, topk_ids_TK, topk_weights_TK, self)
        out = torch.zeros_like(x_TD)
        for expert in topk_ids_TK.unique().tolist():
            token, place = (topk_ids_TK == expert).nonzero(as_tuple=True)
            gate, up, down = (self.weight(expert, name).to(x_TD.dtype) for name in PROJECTIONS)
            rows = x_TD[token]
            part = F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)
            out.index_add_(0, token, part * topk_weights_TK[token, place, None].to(part.dtype))
        return out


class PackedMLP(Movable, MLP):
    """SwiGLU of three packed layers, in one native call."""

    _kept_by_address = ("_layer",)

    def __init__(self, gate_proj: PackedLinear, up_proj: PackedLinear, down_proj: PackedLinear) -> None:
        nn.Module.__init__(self)
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj  # type: ignore[assignment]

    def matrices(self) -> tuple[cpu.Matrix, cpu.Matrix, cpu.Matrix]:
        layers: Any = (self.gate_proj, self.up_proj, self.down_proj)
        gate, up, down = (layer.matrix for layer in layers)
        return gate, up, down

    @cached_property
    def _layer(self) -> cpu.MoeLayer:
        return cpu.MoeLayer(self.gate_proj.in_features, shared=self.matrices())

    def forward(self, x: Tensor) -> Tensor:
        return self._layer(x) if runs_natively(x) else super().forward(x)


class PackedMixture(Movable, MixtureOfExperts):
    """Router, packed experts and the shared expert, in one native call."""

    _kept_by_address = ("_layer",)

    def __init__(self, mixture: MixtureOfExperts, experts: PackedExperts, shared: MLP | None) -> None:
        nn.Module.__init__(self)
        self.gate, self.experts, self.shared_experts = mixture.gate, experts, shared  # type: ignore[assignment]
        self.record_routing, self.last_routing = False, None

    @cached_property
    def _layer(self) -> cpu.MoeLayer:
        experts: Any = self.experts
        shared = self.shared_experts.matrices() if isinstance(self.shared_experts, PackedMLP) else None
        layer = cpu.MoeLayer(
            experts.hidden, [experts.matrices(e) for e in range(experts.num_experts)], shared
        )
        gate = self.gate
        layer.set_router(
            cpu.Matrix(gate.weight.detach()), gate.e_score_correction_bias, topk=gate.num_experts_per_tok,
            groups=gate.n_group, topk_groups=gate.topk_group, normalize=gate.norm_topk_prob,
            factor=gate.routed_scaling_factor,
        )  # fmt: skip
        return layer

    def forward(self, x: Tensor) -> Tensor:
        plain_shared = self.shared_experts is not None and not isinstance(self.shared_experts, PackedMLP)
        if not runs_natively(x) or plain_shared:
            return super().forward(x)
        routing = None
        if self.record_routing:
            self.last_routing = self.gate(x.reshape(-1, x.shape[-1]))
            routing = (self.last_routing.topk_ids_TK, self.last_routing.topk_weights_TK)
        return self._layer(x, routing=routing)


class NativeLinear(Movable, Linear):
    """A float layer that stays as it is in a packed model: read by the native kernels.

    Its results do not depend on the batch around a row, as those of PyTorch's products may.
    """

    _kept_by_address = ("matrix",)

    @classmethod
    def of(cls, layer: Linear) -> NativeLinear:
        layer.__class__ = cls
        assert isinstance(layer, NativeLinear)
        return layer

    @cached_property
    def matrix(self) -> cpu.Matrix:
        return cpu.Matrix(self.weight.detach())

    def forward(self, input: Tensor) -> Tensor:
        if not runs_natively(input) or self.weight.device.type != "cpu":
            return super().forward(input)
        bias = None if self.bias is None else self.bias.float()
        return cpu.linear(input, self.matrix, bias=bias)


class NativeNorm(Movable, RMSNorm):
    """RMSNorm by the native library: one call a row, and no row depends on its neighbours."""

    _kept_by_address = ("_floats",)

    @classmethod
    def of(cls, norm: RMSNorm) -> NativeNorm:
        norm.__class__ = cls
        assert isinstance(norm, NativeNorm)
        return norm

    @cached_property
    def _floats(self) -> Tensor:
        return self.weight.detach().float().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        if not runs_natively(x) or self.weight.device.type != "cpu" or x.dtype != self.weight.dtype:
            return super().forward(x)
        return cpu.rms_norm(x, self._floats, self.eps)
