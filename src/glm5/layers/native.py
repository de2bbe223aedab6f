"""Float layers read by the native kernels: a row's result does not depend on the batch around it.

The same parameters, names and results as the plain parts that they take the place of. PyTorch's own products
choose another order of sums for other numbers of rows; with gradients and on other devices they are used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5.kernels import cpu
from glm5.layers.bucketed_experts import BucketedBank, is_small
from glm5.layers.movable import Movable, runs_natively
from glm5.model.linear import Linear
from glm5.model.moe import ExpertBank
from glm5.model.norms import RMSNorm


class NativeLinear(Movable, Linear):
    """y = x W^T + b."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        bias = layer.bias is not None
        Linear.__init__(self, layer.in_features, layer.out_features, bias, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.train(layer.training)

    @property
    def matrix(self) -> cpu.Matrix:
        """For the native kernels; its memory is the parameter's."""
        found: cpu.Matrix = self.kept("matrix", lambda: cpu.Matrix(self.weight.detach().contiguous()))
        return found

    def forward(self, input: Tensor) -> Tensor:
        if not runs_natively(input) or self.weight.device.type != "cpu":
            return super().forward(input)
        bias = None if self.bias is None else self.bias.float()
        return cpu.linear(input, self.matrix, bias=bias)


class NativeNorm(Movable, RMSNorm):
    """RMSNorm in one call."""

    def __init__(self, norm: RMSNorm) -> None:
        RMSNorm.__init__(self, 0, norm.eps)
        self.weight = norm.weight

    def forward(self, x: Tensor) -> Tensor:
        if not runs_natively(x) or self.weight.device.type != "cpu" or x.dtype != self.weight.dtype:
            return super().forward(x)
        return cpu.rms_norm(x, self.weight.detach().float(), self.eps)


class NativeExperts(Movable):
    """A bank of float experts: gate and up stacked, as `ExpertBank` holds them."""

    def __init__(self, bank: ExpertBank) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = bank.gate_up_proj, bank.down_proj

    @property
    def bank(self) -> cpu.ExpertBank:
        """For the native kernels: every expert in its slot."""
        found: cpu.ExpertBank = self.kept("bank", self._make_bank)
        return found

    def initialize(self, std: float, generator: torch.Generator | None) -> None:
        ExpertBank.initialize(self, std, generator)  # type: ignore[arg-type]

    def _make_bank(self) -> cpu.ExpertBank:
        gate_up, down = self.gate_up_proj.detach(), self.down_proj.detach()
        experts, hidden, width = down.shape
        return cpu.ExpertBank.of(
            hidden,
            [
                (cpu.Matrix(gate_up[e, :width]), cpu.Matrix(gate_up[e, width:]), cpu.Matrix(down[e]))
                for e in range(experts)
            ],
        )

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """sum_k weight_k * down(silu(gate x) * up x), [T, D]."""
        if runs_natively(x_TD) and self.down_proj.device.type == "cpu":
            layer = self.kept("layer", lambda: cpu.MoeLayer(self.down_proj.shape[1], self.bank))
            out: Tensor = layer(x_TD, routing=(topk_ids_TK, topk_weights_TK))
            return out
        forward = BucketedBank.forward if is_small(self) else ExpertBank.forward  # as training swaps them in
        return forward(self, x_TD, topk_ids_TK, topk_weights_TK)  # type: ignore[arg-type]
