"""Layers of the network made of packed integers: the same names and results, other material.

On the CPU the native kernels compute from the codes as they lie in the file, on a GPU Triton's; elsewhere,
or where gradients are wanted, the weights are unpacked first. Letters: E experts, D hidden, I expert width,
T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glm5.formats.packed import PROJECTIONS, Packed, Scheme
from glm5.formats.packing import dequantize, words_per_row
from glm5.kernels import cpu, cuda
from glm5.kernels.memory import empty_weights
from glm5.layers.movable import NATIVE, Movable, runs_natively
from glm5.lazy import lazy


class PackedLinear(Movable):
    """y = x W^T + b with W in packed integers; `reserve()` gives it memory."""

    def __init__(
        self, in_features: int, out_features: int, scheme: Scheme, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.bias = bias if isinstance(bias, nn.Parameter | None) else nn.Parameter(bias, requires_grad=False)
        self.words: Tensor
        self.scales: Tensor
        self.register_buffer("words", None)
        self.register_buffer("scales", None)

    def reserve(self, device: torch.device) -> Packed:
        """Memory on a device, not written yet."""
        rows, groups = self.out_features, self.in_features // self.scheme.group
        words = words_per_row(self.in_features, self.scheme.bits)
        self.words = empty_weights((rows, words), torch.int32, device)
        self.scales = empty_weights((rows, groups), self.scheme.scale_dtype, device)
        return self.packed()

    def packed(self) -> Packed:
        return Packed(self.words, self.scales)

    @property
    def matrix(self) -> cpu.Matrix:
        """For the native kernels; its memory is the module's."""
        found: cpu.Matrix = self.kept("matrix", self._make_matrix)
        return found

    def _make_matrix(self) -> cpu.Matrix:
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

    def reserve_like(self, like: Tensor) -> None:
        """Memory on the device of `like`, whose dtype the rows will have."""
        self.reserve(like.device)
        self.like = torch.empty(0, dtype=like.dtype, device=like.device)

    def forward(self, ids: Tensor) -> Tensor:
        if self.words.device.type == "cpu" and self.like.dtype in NATIVE:
            return cpu.take_rows(ids, self.matrix, self.like.dtype)
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


class PackedExperts(Movable):
    """All routed experts of a layer, each one run of bytes: codes and scales of gate, up, down.

    The run has the order of the checkpoint, so that a whole expert is one read and one slot.
    """

    def __init__(self, experts: int, hidden: int, width: int, scheme: Scheme) -> None:
        super().__init__()
        self.num_experts, self.hidden, self.width, self.scheme = experts, hidden, width, scheme
        self.bytes: Tensor
        self.register_buffer("bytes", None)

    def shape(self, projection: str) -> tuple[int, int]:
        return (self.hidden, self.width) if projection == "down_proj" else (self.width, self.hidden)

    @lazy
    def parts(self) -> dict[str, tuple[slice, slice]]:
        """The bytes of an expert's codes and scales within its run, by projection."""
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
        return self.parts["down_proj"][1].stop

    def reserve(self, device: torch.device) -> None:
        """Memory for every expert, not written yet."""
        stride = -(-self.bytes_per_expert // 64) * 64
        self.bytes = empty_weights((self.num_experts, stride), torch.uint8, device)

    def packed(self, expert: int, projection: str) -> Packed:
        """Views into the expert's bytes."""
        rows, columns = self.shape(projection)
        codes, scales = self.parts[projection]
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
        """An unpacked matrix, fp32 [out, in]."""
        return dequantize(
            *self.packed(expert, projection), bits=self.scheme.bits, columns=self.shape(projection)[1]
        )

    @property
    def bank(self) -> cpu.ExpertBank:
        """For the native kernels: every expert in its slot."""

        def make() -> cpu.ExpertBank:
            return cpu.ExpertBank.of(self.hidden, [self.matrices(e) for e in range(self.num_experts)])

        found: cpu.ExpertBank = self.kept("bank", make)
        return found

    @property
    def runs(self) -> cuda.Bank:
        """For the kernels of a GPU."""
        gate, up, down = ((codes.start, scales.start) for codes, scales in self.parts.values())
        scheme = self.scheme
        return cuda.Bank(
            self.bytes,
            (gate, up, down),
            self.hidden,
            self.width,
            scheme.bits,
            scheme.group,
            scheme.scale_dtype,
        )

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """sum_k weight_k * down(silu(gate x) * up x), [T, D]; elsewhere unpacked an expert at a time."""
        if runs_natively(x_TD):
            layer = self.kept("layer", lambda: cpu.MoeLayer(self.hidden, self.bank))
            out: Tensor = layer(x_TD, routing=(topk_ids_TK, topk_weights_TK))
            return out
        if cuda.runs_here(x_TD):
            return cuda.experts(x_TD, topk_ids_TK, topk_weights_TK, self.runs)
        out = torch.zeros_like(x_TD)
        for expert in topk_ids_TK.unique().tolist():
            token, choice = (topk_ids_TK == expert).nonzero(as_tuple=True)
            gate, up, down = (self.weight(expert, name).to(x_TD.dtype) for name in PROJECTIONS)
            rows = x_TD[token]
            part = F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)
            out.index_add_(0, token, part * topk_weights_TK[token, choice, None].to(part.dtype))
        return out
