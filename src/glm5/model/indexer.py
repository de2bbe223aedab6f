"""The DSA indexer: a small scorer that picks which cached tokens the main attention reads.

I[t, s] = sum_h w[t, h] * relu(q[t, h] . k[s] / sqrt(d)), fp32; query t keeps the `index_topk`
visible tokens with the largest I. Equal scores are common (relu makes exact zeros), so the rule
for ties is part of the model: **the lowest slot first**, whatever the chunking, cache or batch.
Letters: B rows, T queries, S key slots, H index heads, K selected.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glm5.config import ModelConfig
from glm5.model.linear import Linear
from glm5.model.rotary import Rotation, rotate
from glm5.model.step import LayerCache, Part, Step

INDEX_NORM_EPS = 1e-6


class Selection:
    """The tokens chosen for each query, as a mask [B, T, S] or as sorted slots [B, T, K]."""

    def __init__(self, mask_BTS: Tensor, topk: int) -> None:
        self.mask_BTS = mask_BTS
        self.topk = topk
        self._slots: Tensor | None = None

    def of(self, number: int, part: Part) -> Selection:
        """The selection of a part of the step."""
        return self

    @property
    def slots_BTK(self) -> Tensor:
        """Chosen slots in rising order, int64; -1 where fewer than K are visible."""
        if self._slots is None:
            num_keys = self.mask_BTS.shape[-1]
            slots = torch.arange(num_keys, device=self.mask_BTS.device)
            ranked = torch.where(self.mask_BTS, slots, num_keys)
            chosen = ranked.topk(min(self.topk, num_keys), dim=-1, largest=False, sorted=True).values
            self._slots = torch.where(chosen < num_keys, chosen, -1)
        return self._slots


class PartSelections(Selection):
    """The selections of a step's parts, each over the keys of its own sequence."""

    def __init__(self, parts: list[Selection]) -> None:
        self.each, self.topk = parts, parts[0].topk

    def of(self, number: int, part: Part) -> Selection:
        return self.each[number]

    @property
    def slots_BTK(self) -> Tensor:
        """[1, N, K] for all tokens of the step."""
        slots = [F.pad(s, (0, self.topk - s.shape[-1]), value=-1) for s in (p.slots_BTK for p in self.each)]
        return torch.cat(slots, dim=1)


class Indexer(nn.Module):
    """Scores every visible cached token for every query, with a few narrow heads (DeepSeek-V3.2, 2.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.q_lora_rank is not None and config.index_topk is not None
        self.num_heads = config.index_n_heads
        self.head_dim = config.index_head_dim
        self.rotary_dim = config.qk_rope_head_dim
        self.topk = config.index_topk
        self.interleaved = config.indexer_rope_interleave
        self.wq_b = Linear(config.q_lora_rank, self.num_heads * self.head_dim, bias=False)
        self.wk = Linear(config.hidden_size, self.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=INDEX_NORM_EPS)
        self.weights_proj = Linear(config.hidden_size, self.num_heads, bias=False)

    def initialize(self, std: float, generator: torch.Generator | None) -> None:
        self.k_norm.weight.fill_(1.0)
        self.k_norm.bias.zero_()

    def forward(
        self, x_BTD: Tensor, q_latent_BTR: Tensor, step: Step, cache: LayerCache | None
    ) -> Selection | None:
        """Write this step's index keys to `cache`; return the selection, None = every token."""
        keys_BTd = self.keys(x_BTD, step.angles)
        held = [keys_BTd] if cache is None else cache.append_index_keys(keys_BTd)
        if all(keys_BSd.shape[1] <= self.topk for keys_BSd in held):
            return None
        found = []
        for part, keys_BSd in zip(step.parts, held, strict=True):
            x = x_BTD[:, part.tokens]
            visible = part.visible.as_mask(x.shape[1], x.device)
            if keys_BSd.shape[1] <= self.topk:
                found.append(Selection(visible, self.topk))
            else:
                angles = Rotation(step.angles.turns[:, part.tokens])
                scores = self.scores(x, q_latent_BTR[:, part.tokens], keys_BSd, angles)
                found.append(select(scores, visible, self.topk))
        return found[0] if len(found) == 1 else PartSelections(found)

    def keys(self, x_BTD: Tensor, angles: Rotation) -> Tensor:
        """One key per token, shared by all heads: LayerNorm(W_k x), the first dims rotated."""
        return self._rotated(self.k_norm(self.wk(x_BTD)), angles)

    def queries(self, q_latent_BTR: Tensor, angles: Rotation) -> Tensor:
        """[B, T, H, d], the first dims rotated."""
        return self._rotated(self.wq_b(q_latent_BTR).unflatten(-1, (self.num_heads, self.head_dim)), angles)

    def head_weights(self, x_BTD: Tensor) -> Tensor:
        """w / sqrt(H d), fp32 [B, T, H]."""
        return self.weights_proj(x_BTD).float() * (self.num_heads**-0.5 * self.head_dim**-0.5)

    def _rotated(self, x: Tensor, angles: Rotation) -> Tensor:
        rotary, rest = x.split_with_sizes([self.rotary_dim, self.head_dim - self.rotary_dim], dim=-1)
        return torch.cat((rotate(rotary, angles, interleaved=self.interleaved), rest), dim=-1)

    def scores(self, x_BTD: Tensor, q_latent_BTR: Tensor, keys_BSd: Tensor, angles: Rotation) -> Tensor:
        """Index scores I [B, T, S], fp32, before any mask."""
        batch, num_queries, _ = x_BTD.shape
        q = self.queries(q_latent_BTR, angles).float()
        weights_BTH = self.head_weights(x_BTD)
        keys_BdS = keys_BSd.float().transpose(1, 2)
        products = torch.bmm(q.reshape(batch, num_queries * self.num_heads, self.head_dim), keys_BdS)
        products = F.relu(products).view(batch * num_queries, self.num_heads, -1)
        scores = torch.bmm(weights_BTH.reshape(batch * num_queries, 1, self.num_heads), products)
        return scores.view(batch, num_queries, -1)


def select(scores_BTS: Tensor, visible_BTS: Tensor, topk: int) -> Selection:
    """Exactly min(topk, visible) tokens a query; ties go to the lowest slot."""
    scores = scores_BTS.masked_fill(~visible_BTS, float("-inf"))
    threshold = scores.topk(topk, dim=-1).values[..., -1:]
    above = scores > threshold
    level = (scores == threshold) & visible_BTS
    room = topk - above.sum(dim=-1, keepdim=True)
    first_of_level = level & (level.cumsum(dim=-1) <= room)
    return Selection(above | first_of_level, topk)
