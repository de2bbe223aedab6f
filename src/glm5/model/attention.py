"""Attention of the GLM family: MLA (with DSA) for GLM-5 and 4.7-Flash, GQA for GLM-4.5..4.7.

MLA has two forms of one formula. *Expanded*: keys and values are made from the latents; cheapest
for many queries. *Absorbed*: W_UK is folded into the query and W_UV into the output, so that
scores are taken against the 576-wide cache itself; cheapest for few queries on a long cache.
Letters: B rows, T queries, S key slots, D hidden, H heads, R kv_lora_rank, r rotary width,
n qk_nope_head_dim, v value width, K selected slots.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glm5.config import ModelConfig
from glm5.model.indexer import Indexer, Selection
from glm5.model.linear import Linear
from glm5.model.masks import Visibility
from glm5.model.norms import RMSNorm
from glm5.model.rotary import Rotation, rotate
from glm5.model.step import Step


class MultiHeadLatentAttention(nn.Module):
    """MLA over a compressed cache, with the DSA selection where the config has one.

    The cache row of a token is `kv_lora_rank + qk_rope_head_dim` values, latent first, after norm
    and rotation.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.kv_lora_rank is not None
        self.num_heads = config.num_attention_heads
        self.latent_dim = config.kv_lora_rank
        self.nope_dim = config.qk_nope_head_dim
        self.rotary_dim = config.qk_rope_head_dim
        self.value_dim = config.v_head_dim
        self.interleaved = config.rope_interleave
        self.scale = config.qk_head_dim**-0.5
        self.form = "auto"  # expanded, absorbed, or the one of fewer multiply-adds

        hidden, bias, eps = config.hidden_size, config.attention_bias, config.norm_eps_of_latents
        query_width = self.num_heads * config.qk_head_dim
        self.q_a_proj: Linear | None = None
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, query_width, bias=False)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps)
            self.q_b_proj = Linear(config.q_lora_rank, query_width, bias=False)
        self.kv_a_proj_with_mqa = Linear(hidden, self.latent_dim + self.rotary_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.latent_dim, eps)
        self.kv_b_proj = Linear(
            self.latent_dim, self.num_heads * (self.nope_dim + self.value_dim), bias=False
        )
        self.o_proj = Linear(self.num_heads * self.value_dim, hidden, bias=bias)
        self.indexer = Indexer(config) if config.has_indexer(layer) else None
        self.layer = layer

    def forward(
        self, x_BTD: Tensor, step: Step, selection: Selection | None = None
    ) -> tuple[Tensor, Selection | None]:
        """Attend; returns the output [B, T, D] and the selection for the layers that share it."""
        if step.probe is not None:
            step.probe.attention_input(self.layer, x_BTD)
        angles, cache = step.angles, step.layer_cache(self.layer)
        q_latent, q_nope, q_rope = self.queries(x_BTD, angles)
        latents_BTC = self.latents(x_BTD, angles)
        held = [latents_BTC] if cache is None else cache.append_latents(latents_BTC)
        if self.indexer is not None:
            assert q_latent is not None
            # The indexer has a loss of its own; the language-model loss must not reach it.
            selection = self.indexer(x_BTD.detach(), q_latent.detach(), step, cache)
        heads_out = []
        for number, (part, latents_BSC) in enumerate(zip(step.parts, held, strict=True)):
            q = q_nope[:, part.tokens], q_rope[:, part.tokens]
            chosen = None if selection is None else selection.of(number, part)
            absorbed = self.absorbed_is_cheaper(q[0].shape[1], latents_BSC.shape[1])
            form = self.absorbed if absorbed else self.expanded
            heads_out.append(form(*q, latents_BSC, part.visible, chosen))
        return self.o_proj(joined(heads_out).flatten(2)), selection

    def query_latent(self, x_BTD: Tensor) -> Tensor:
        """The normalized query latent [B, T, q_lora_rank], which the indexer reads too."""
        assert self.q_a_proj is not None
        return self.q_a_layernorm(self.q_a_proj(x_BTD))

    def probabilities(self, x_BTD: Tensor, angles: Rotation, mask_BTS: Tensor) -> Tensor:
        """Attention weights [B, H, T, S] of an uncached pass: what an indexer learns to foresee."""
        _, q_nope, q_rope = self.queries(x_BTD, angles)
        latent, k_rope = self.latents(x_BTD, angles).split_with_sizes(
            [self.latent_dim, self.rotary_dim], dim=-1
        )
        kv = self.kv_b_proj(latent).view(*x_BTD.shape[:2], self.num_heads, -1)
        scores = torch.einsum("bthd,bshd->bhts", q_nope.float(), kv[..., : self.nope_dim].float())
        scores = scores + torch.einsum("bthr,bsr->bhts", q_rope.float(), k_rope.float())
        scores = (scores * self.scale).masked_fill(~mask_BTS.unsqueeze(1), float("-inf"))
        return scores.softmax(dim=-1)

    def queries(self, x_BTD: Tensor, angles: Rotation) -> tuple[Tensor | None, Tensor, Tensor]:
        """The query latent, the queries [B, T, H, n] and their rotated part [B, T, H, r]."""
        batch, num_queries, _ = x_BTD.shape
        q_latent = None
        if self.q_a_proj is None:
            q = self.q_proj(x_BTD)
        else:
            q_latent = self.query_latent(x_BTD)
            q = self.q_b_proj(q_latent)
        q = q.view(batch, num_queries, self.num_heads, self.nope_dim + self.rotary_dim)
        nope, rope = q.split_with_sizes([self.nope_dim, self.rotary_dim], dim=-1)
        return q_latent, nope, rotate(rope, angles, interleaved=self.interleaved)

    def latents(self, x_BTD: Tensor, angles: Rotation) -> Tensor:
        """What is cached: [normalized latent | rotated shared key], [B, T, R + r]."""
        latent, rope = self.kv_a_proj_with_mqa(x_BTD).split_with_sizes(
            [self.latent_dim, self.rotary_dim], dim=-1
        )
        latent = self.kv_a_layernorm(latent)
        return torch.cat((latent, rotate(rope, angles, interleaved=self.interleaved)), dim=-1)

    def absorbed_is_cheaper(self, num_queries: int, num_keys: int) -> bool:
        """Compare multiply-adds of the two forms; see the module's first lines."""
        if self.form != "auto":
            return self.form == "absorbed"
        fold = self.latent_dim * (self.nope_dim + self.value_dim)
        absorbed = num_queries * (fold + num_keys * (2 * self.latent_dim + self.rotary_dim))
        narrow = self.nope_dim + self.rotary_dim + self.value_dim
        expanded = num_keys * fold + num_queries * num_keys * narrow
        return absorbed < expanded

    def expanded(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latents_BSC: Tensor,
        visible: Visibility,
        selection: Selection | None,
    ) -> Tensor:
        batch, num_keys, _ = latents_BSC.shape
        latent, k_rope = latents_BSC.split_with_sizes([self.latent_dim, self.rotary_dim], dim=-1)
        kv = self.kv_b_proj(latent).view(batch, num_keys, self.num_heads, self.nope_dim + self.value_dim)
        k_nope, value = kv.split_with_sizes([self.nope_dim, self.value_dim], dim=-1)
        k_rope = k_rope.unsqueeze(2).expand(-1, -1, self.num_heads, -1)
        q = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)
        k = torch.cat((k_nope, k_rope), dim=-1).transpose(1, 2)
        return dot_product_attention(q, k, value.transpose(1, 2), visible, selection, self.scale)

    def absorbed(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latents_BSC: Tensor,
        visible: Visibility,
        selection: Selection | None,
    ) -> Tensor:
        batch, num_queries, heads, _ = q_nope.shape
        up = self.kv_b_proj.weight.to(q_nope.dtype)  # packed integers unpack to fp32
        up = up.view(heads, self.nope_dim + self.value_dim, self.latent_dim)
        w_uk, w_uv = up.split_with_sizes([self.nope_dim, self.value_dim], dim=1)
        rows = batch * num_queries
        q_latent = torch.bmm(q_nope.reshape(rows, heads, self.nope_dim).transpose(0, 1), w_uk)
        q_latent = q_latent.transpose(0, 1).view(batch, num_queries, heads, self.latent_dim)
        q = torch.cat((q_latent, q_rope), dim=-1)

        gathers = selection is not None and num_queries * selection.topk <= latents_BSC.shape[1]
        if gathers:
            assert selection is not None
            mixed = self._attend_gathered(q, latents_BSC, selection)
        else:
            mixed = self._attend_cache(q, latents_BSC, visible, selection)
        out = torch.bmm(mixed.reshape(rows, heads, -1).transpose(0, 1), w_uv.transpose(1, 2))
        return out.transpose(0, 1).view(batch, num_queries, heads, self.value_dim)

    def _attend_cache(
        self, q_BTHC: Tensor, latents_BSC: Tensor, visible: Visibility, selection: Selection | None
    ) -> Tensor:
        batch, num_queries, heads, width = q_BTHC.shape
        scores = torch.bmm(q_BTHC.view(batch, num_queries * heads, width), latents_BSC.transpose(1, 2))
        scores = scores.view(batch, num_queries, heads, -1) * self.scale
        mask = _combined_mask(visible, selection, num_queries, scores.device)
        if mask is None and visible.is_causal and num_queries > 1:
            mask = visible.as_mask(num_queries, scores.device)
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(2), float("-inf"))
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q_BTHC.dtype)
        weights = weights.view(batch, num_queries * heads, -1)
        mixed = torch.bmm(weights, latents_BSC[..., : self.latent_dim])
        return mixed.view(batch, num_queries, heads, self.latent_dim)

    def _attend_gathered(self, q_BTHC: Tensor, latents_BSC: Tensor, selection: Selection) -> Tensor:
        """Read only the selected rows of the cache: what makes decoding cheap on long contexts."""
        batch, num_queries, heads, width = q_BTHC.shape
        slots_BTK = selection.slots_BTK
        rows = slots_BTK.clamp(min=0).reshape(batch, -1, 1).expand(-1, -1, width)
        picked = latents_BSC.gather(1, rows).view(batch * num_queries, -1, width)
        scores = torch.bmm(q_BTHC.reshape(-1, heads, width), picked.transpose(1, 2)) * self.scale
        absent = (slots_BTK < 0).view(batch * num_queries, 1, -1)
        scores = scores.masked_fill(absent, float("-inf"))
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q_BTHC.dtype)
        mixed = torch.bmm(weights, picked[..., : self.latent_dim])
        return mixed.view(batch, num_queries, heads, self.latent_dim)


class GroupedQueryAttention(nn.Module):
    """GQA with half-split partial rotary embedding and optional per-head QK-norm (GLM-4.5..4.7)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.head_dim = config.attention_head_dim
        self.rotary_dim = config.rotary_dim
        self.scale = self.head_dim**-0.5
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = Linear(hidden, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = Linear(hidden, self.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = Linear(hidden, self.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = Linear(self.num_heads * self.head_dim, hidden, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.use_qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.use_qk_norm else None

    def forward(
        self, x_BTD: Tensor, step: Step, selection: Selection | None = None
    ) -> tuple[Tensor, Selection | None]:
        """Attend; returns the output [B, T, D], and no selection."""
        if step.probe is not None:
            step.probe.attention_input(self.layer, x_BTD)
        angles, cache = step.angles, step.layer_cache(self.layer)
        batch, num_queries, _ = x_BTD.shape
        q = self.q_proj(x_BTD).view(batch, num_queries, self.num_heads, self.head_dim)
        k = self.k_proj(x_BTD).view(batch, num_queries, self.num_key_value_heads, self.head_dim)
        value = self.v_proj(x_BTD).view(batch, num_queries, self.num_key_value_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self._rotate(q, angles), self._rotate(k, angles)
        held = [(k, value)] if cache is None else cache.append_key_values(k, value)
        out = []
        for part, (keys, values) in zip(step.parts, held, strict=True):
            heads = (q[:, part.tokens].transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))
            out.append(dot_product_attention(*heads, part.visible, None, self.scale))
        return self.o_proj(joined(out).flatten(2)), None

    def _rotate(self, x: Tensor, angles: Rotation) -> Tensor:
        rotary, rest = x.split_with_sizes([self.rotary_dim, self.head_dim - self.rotary_dim], dim=-1)
        return torch.cat((rotate(rotary, angles, interleaved=False), rest), dim=-1)


def joined(parts: list[Tensor]) -> Tensor:
    """What the parts of a step give, one behind the other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def dot_product_attention(
    q_BHTd: Tensor,
    k_BHSd: Tensor,
    v_BHSd: Tensor,
    visible: Visibility,
    selection: Selection | None,
    scale: float,
) -> Tensor:
    """Softmax attention with fp32 softmax; returns [B, T, H, v]. K and V may have fewer heads."""
    num_queries, width, value_width = q_BHTd.shape[2], q_BHTd.shape[3], v_BHSd.shape[3]
    mask = _combined_mask(visible, selection, num_queries, q_BHTd.device)
    whole_triangle = mask is None and visible.is_causal and num_queries > 1  # PyTorch's rule is for T == S
    if width != value_width:
        # PyTorch's fused kernels want one head width; zero columns change no product.
        widest = max(width, value_width)
        q_BHTd, k_BHSd = F.pad(q_BHTd, (0, widest - width)), F.pad(k_BHSd, (0, widest - width))
        v_BHSd = F.pad(v_BHSd, (0, widest - value_width))
    out = F.scaled_dot_product_attention(
        q_BHTd,
        k_BHSd,
        v_BHSd,
        attn_mask=None if mask is None else mask.unsqueeze(1),
        is_causal=whole_triangle,
        scale=scale,
        enable_gqa=q_BHTd.shape[1] != k_BHSd.shape[1],
    )
    return out[..., :value_width].transpose(1, 2)


def _combined_mask(
    visible: Visibility, selection: Selection | None, num_queries: int, device: torch.device
) -> Tensor | None:
    """Visible and selected, as one bool mask; None: all keys of one query, or the whole triangle."""
    if selection is not None:
        return selection.mask_BTS  # already a subset of the visible tokens
    if visible.mask_BTS is None and visible.is_causal and 1 < num_queries < visible.num_keys:
        return visible.as_mask(num_queries, device)
    return visible.mask_BTS
