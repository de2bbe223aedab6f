"""Mixture of experts: the router, the bank of routed experts, the shared expert.

Router arithmetic is fp32 whatever the weights are. Letters: T tokens (batch and time flattened),
D hidden, E experts, K experts per token, I moe_intermediate_size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glm5.config import ModelConfig
from glm5.model.linear import Linear
from glm5.model.routing import Routing
from glm5.model.step import Probe


class Router(nn.Module):
    """Sigmoid scores; the correction bias chooses, the plain scores weigh (DeepSeek-V3 report, 2.1.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.n_group, self.topk_group = config.n_group, config.topk_group
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        # Ours, training only: the share of experts hidden from each token (0 = as published).
        self.expert_dropout = 0.0
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias: Tensor
        self.register_buffer(
            "e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32)
        )

    def initialize(self, std: float, generator: torch.Generator | None) -> None:
        self.weight.normal_(0.0, std, generator=generator)
        self.e_score_correction_bias.zero_()

    def forward(self, x_TD: Tensor) -> Routing:
        scores_TE = self._scores(x_TD)
        choice_TE = scores_TE.detach() + self.e_score_correction_bias
        if self.n_group > 1:
            choice_TE = self._keep_best_groups(choice_TE)
        if self.training and self.expert_dropout > 0:
            hidden = torch.rand_like(choice_TE) < self.expert_dropout
            choice_TE = choice_TE.masked_fill(hidden, -1e4)  # still choosable if too few remain
        topk_ids_TK = choice_TE.topk(self.num_experts_per_tok, dim=-1).indices
        weights_TK = scores_TE.gather(1, topk_ids_TK)
        if self.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(topk_ids_TK, weights_TK * self.routed_scaling_factor, scores_TE)

    def _scores(self, x_TD: Tensor) -> Tensor:
        kind = x_TD.device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return F.linear(x_TD.float(), self.weight.float()).sigmoid()
        return F.linear(x_TD.float(), self.weight.float()).sigmoid()

    def _keep_best_groups(self, choice_TE: Tensor) -> Tensor:
        """Only the `topk_group` groups with the largest sum of their two best scores compete."""
        grouped = choice_TE.view(choice_TE.shape[0], self.n_group, -1)
        group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
        best = group_scores.topk(self.topk_group, dim=-1).indices
        keep = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
        return grouped.masked_fill(~keep.unsqueeze(-1), float("-inf")).flatten(1)


class ExpertBank(nn.Module):
    """All routed experts of a layer, gate and up stacked as `transformers` does in memory."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def initialize(self, std: float, generator: torch.Generator | None) -> None:
        self.gate_up_proj.normal_(0.0, std, generator=generator)
        self.down_proj.normal_(0.0, std, generator=generator)

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """sum_k weight_k * down(silu(gate x) * up x), [T, D]; an expert at a time, its tokens together."""
        tokens, k = topk_ids_TK.shape
        order = topk_ids_TK.reshape(-1).argsort(stable=True)
        counts = torch.bincount(topk_ids_TK.reshape(-1), minlength=self.gate_up_proj.shape[0]).tolist()
        rows = x_TD.index_select(0, order // k)
        outputs, start = [], 0
        for expert, count in enumerate(counts):
            if count == 0:
                continue
            gate, up = F.linear(rows[start : start + count], self.gate_up_proj[expert]).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * up, self.down_proj[expert]))
            start += count
        out_NC = torch.cat(outputs)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(tokens * k, device=order.device))
        out = out_NC.index_select(0, back).view(tokens, k, -1)
        return torch.einsum("tk,tkd->td", topk_weights_TK.to(out.dtype), out)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor, probe: Probe | None = None) -> Tensor:
        """x [..., D]; there is nothing to tell a probe."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MixtureOfExperts(nn.Module):
    """Router, bank of routed experts, ungated shared expert. The bank never sees its router."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.gate = Router(config)
        self.experts = ExpertBank(config)
        self.shared_experts = (
            MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
            if config.n_shared_experts
            else None
        )

    def forward(self, x: Tensor, probe: Probe | None = None) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.gate(x_TD)
        if probe is not None:
            probe.routing(self.layer, routing)
        out = self.experts(x_TD, routing.topk_ids_TK, routing.topk_weights_TK)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x_TD)
        return out.view_as(x)
