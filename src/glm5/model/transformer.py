"""The decoder: embedding, layers, final norm, output head; the MTP layer beside them.

Module names are those of the Hugging Face checkpoints, except that the experts of a layer are one
tensor and the MTP layer is `mtp.0` instead of `model.layers.N` (see `glm5.checkpoint.names`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from glm5.config import ModelConfig
from glm5.layers.torch_cpu import Linear
from glm5.model.attention import GroupedQueryAttention, MultiHeadLatentAttention
from glm5.model.indexer import Indexer, Selection
from glm5.model.masks import TokenPlaces, Visibility, visibility
from glm5.model.moe import MLP, ExpertBank, MixtureOfExperts, Router
from glm5.model.norms import RMSNorm
from glm5.model.rotary import Rotation, rotation

if TYPE_CHECKING:
    from glm5.model.mtp import MTPLayer


@dataclass
class CausalLMOutput:
    """logits [B, T, vocab] (the last `logits_to_keep` tokens); hidden [B, T, D] after the norm."""

    logits: Tensor
    hidden: Tensor


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        attention = MultiHeadLatentAttention if config.uses_mla else GroupedQueryAttention
        self.self_attn: MultiHeadLatentAttention | GroupedQueryAttention = attention(config, layer)
        self.mlp: MixtureOfExperts | MLP = (
            MixtureOfExperts(config)
            if config.is_sparse(layer)
            else MLP(config.hidden_size, config.intermediate_size)
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        angles: Rotation,
        visible: Visibility,
        cache: Any | None,
        selection: Selection | None,
    ) -> tuple[Tensor, Selection | None]:
        attended, selection = self.self_attn(self.input_layernorm(x_BTD), angles, visible, cache, selection)
        x_BTD = x_BTD + attended
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), selection


class Embedding(nn.Embedding):
    """`nn.Embedding` without the initialization, which on the meta device imports torch's compiler (1 s)."""

    def reset_parameters(self) -> None:
        pass


class GlmModel(nn.Module):
    """Token ids to hidden states after the final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, input_ids: Tensor, angles: Rotation, visible: Visibility, cache: Any | None = None
    ) -> Tensor:
        x_BTD = self.embed_tokens(input_ids)
        selection = None
        for index, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layers[index]
            x_BTD, selection = layer(x_BTD, angles, visible, layer_cache, selection)
        return self.norm(x_BTD)


class GlmForCausalLM(nn.Module):
    """A GLM-5-family language model: `model(input_ids).logits`, as in `transformers`.

    Build it from a `ModelConfig`; weights are uninitialized until `reset_parameters()` or a
    checkpoint fills them (so that it can be built on the meta device).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        from glm5.model.mtp import MTPLayer  # a decoder layer itself: it imports this module

        self.config = config
        self.model = GlmModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.mtp = nn.ModuleList(
            MTPLayer(config, config.num_hidden_layers + index)
            for index in range(config.num_nextn_predict_layers)
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        prefix_lengths: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Any | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput:
        """Logits for every token (or the last `logits_to_keep`).

        input_ids: int64 [B, T]. With a `cache` they follow what it already holds.
        attention_mask: [B, T], 0 on padding. Positions count from the first unpadded token.
        position_ids: int64 [B, T], overrides the counting.
        prefix_lengths: int64 [B], tokens of each row (from its first unpadded one) that see each
            other in both directions; None = causal, unless the config's `attention_mask_type` is
            prefix and the caller passes lengths.
        document_ids: int64 [B, T], equal within one packed document.
        """
        places = token_places(input_ids, attention_mask, position_ids, prefix_lengths, document_ids, cache)
        keys = places if cache is None else cache.append_places(places)
        hidden = self.hidden_states(input_ids, places, keys, cache)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        kept = hidden if logits_to_keep == 0 else hidden[:, -logits_to_keep:]
        return CausalLMOutput(self.lm_head(kept), hidden)

    def hidden_states(
        self, input_ids: Tensor, places: TokenPlaces, keys: TokenPlaces, cache: Any | None = None
    ) -> Tensor:
        """Hidden states [B, T, D] after the final norm, before the output head."""
        angles = self.angles(places.positions)
        return self.model(input_ids, angles, visibility(places, keys), cache)

    def angles(self, positions_BT: Tensor) -> Rotation:
        return rotation(positions_BT, self.config.rotary_dim, self.config.rope_theta)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal(0, initializer_range) matrices, unit norms, zero biases."""
        std = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, (RMSNorm, nn.LayerNorm)):
                module.weight.fill_(1.0)
            if isinstance(module, nn.LayerNorm):
                module.bias.zero_()
            if isinstance(module, (nn.Linear, nn.Embedding, Router)):
                module.weight.normal_(0.0, std, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
            if isinstance(module, ExpertBank):
                module.gate_up_proj.normal_(0.0, std, generator=generator)
                module.down_proj.normal_(0.0, std, generator=generator)
            if isinstance(module, Router):
                module.e_score_correction_bias.zero_()

    def mtp_layers(self) -> list[MTPLayer]:
        return list(self.mtp)  # type: ignore[arg-type]

    def moe_layers(self) -> list[MixtureOfExperts]:
        """Every expert layer in order, the MTP layer's last."""
        return [module for module in self.modules() if isinstance(module, MixtureOfExperts)]

    def indexers(self) -> list[Indexer]:
        return [module for module in self.modules() if isinstance(module, Indexer)]

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype


def token_places(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    document_ids: Tensor | None = None,
    cache: Any | None = None,
) -> TokenPlaces:
    """Positions and roles of this call's tokens, counted on from what `cache` holds."""
    batch, length = input_ids.shape
    device = input_ids.device
    valid = None
    if attention_mask is not None and not bool(attention_mask.all()):
        valid = attention_mask[:, -length:].bool()
    if position_ids is None:
        start = 0 if cache is None else cache.next_positions(batch)
        if valid is None:
            steps = torch.arange(length, device=device).expand(batch, length)
        else:
            steps = (valid.long().cumsum(dim=1) - 1).clamp(min=0)
        if document_ids is not None:
            steps = steps - _document_starts(document_ids, steps)
        position_ids = steps + start
    prefix = None
    if prefix_lengths is not None:
        prefix = position_ids < prefix_lengths.to(device).view(batch, 1)
    return TokenPlaces(position_ids, valid, prefix, document_ids)


def _document_starts(document_ids: Tensor, steps: Tensor) -> Tensor:
    """The step at which each token's document begins (documents are contiguous)."""
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(first, steps, 0).cummax(dim=1).values
