"""The decoder: embedding, layers, final norm, output head; the MTP layer beside them.

Module names are those of the Hugging Face checkpoints, except that the experts of a layer are one
tensor and the MTP layer is `mtp.0` instead of `model.layers.N` (see `glm5.checkpoint.names`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glm5.config import ModelConfig
from glm5.errors import RequestError
from glm5.model.indexer import Indexer
from glm5.model.layer import DecoderLayer
from glm5.model.linear import Embedding, Linear
from glm5.model.masks import TokenPositions, visibility
from glm5.model.moe import MixtureOfExperts
from glm5.model.mtp import MTPLayer
from glm5.model.norms import RMSNorm
from glm5.model.rotary import Rotation, rotation
from glm5.model.step import ComingTokens, KeyValueCache, Probe, Step


@dataclass
class CausalLMOutput:
    """logits [B, T, vocab] (the last `logits_to_keep` tokens); hidden [B, T, D] after the norm."""

    logits: Tensor
    hidden: Tensor


class GlmModel(nn.Module):
    """Token ids to hidden states after the final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer.of(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, step: Step) -> Tensor:
        """Hidden states [B, T, D] of ids int64 [B, T]."""
        x_BTD = self.embed_tokens(input_ids)
        selection = None
        for layer in self.layers:
            x_BTD, selection = layer(x_BTD, step, selection)
        return self.norm(x_BTD)


class GlmForCausalLM(nn.Module):
    """A GLM-5-family language model: `model(input_ids).logits`, as in `transformers`.

    Build it from a `ModelConfig`; weights are uninitialized until `reset_parameters()` or a
    checkpoint fills them (so that it can be built on the meta device).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
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
        cache: KeyValueCache | None = None,
        probe: Probe | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput:
        """Logits for every token (or the last `logits_to_keep`).

        input_ids: int64 [B, T]. With a `cache` of B sequences they follow what it already holds; it takes
            no padding, positions or documents of the caller (see `extend` for rows of different lengths).
        attention_mask: [B, T], 0 on padding. Positions count from the first unpadded token.
        position_ids: int64 [B, T], overrides the counting.
        prefix_lengths: int64 [B], tokens of each row (from its first unpadded one) that see each
            other in both directions; None = causal, unless the config's `attention_mask_type` is
            prefix and the caller passes lengths.
        document_ids: int64 [B, T], equal within one packed document.
        probe: told what passes through the layers.
        """
        _check_ids(input_ids, self.config.vocab_size)
        if cache is None:
            positions = token_positions(input_ids, attention_mask, position_ids, prefix_lengths, document_ids)
            hidden = self.model(input_ids, self.step(positions, probe))
        else:
            given = {"position_ids": position_ids, "document_ids": document_ids}
            if attention_mask is not None and not bool(attention_mask.all()):
                given["attention_mask"] = attention_mask
            wrong = next((name for name, value in given.items() if value is not None), None)
            if wrong is not None:
                raise RequestError(f"{wrong} does not go with a cache; give each row a sequence of its own")
            prefixes = None if prefix_lengths is None else prefix_lengths.tolist()
            coming = cache.coming([input_ids.shape[1]] * len(input_ids), prefixes)
            hidden = self.extend(input_ids.flatten(), coming, probe).view(*input_ids.shape, -1)
        kept = hidden if logits_to_keep == 0 else hidden[:, -logits_to_keep:]
        return CausalLMOutput(self.lm_head(kept), hidden)

    def extend(self, ids_N: Tensor, coming: ComingTokens, probe: Probe | None = None) -> Tensor:
        """Hidden states [N, D] of one step: new tokens of any sequences, which are then held.

        ids: int64 [N], the tokens of each sequence one behind the other.
        """
        hidden = self.model(ids_N.unsqueeze(0), self.cached_step(coming, probe))
        coming.advance()
        return hidden.squeeze(0)

    def cached_step(self, coming: ComingTokens, probe: Probe | None = None) -> Step:
        """A pass over tokens behind what a cache holds."""
        return Step(self.angles(coming.positions), cache=coming, probe=probe, shared=coming.shared)

    def step(self, positions: TokenPositions, probe: Probe | None = None) -> Step:
        """A pass over tokens at these positions, without a cache."""
        return Step(self.angles(positions.positions), visibility(positions, positions), probe=probe)

    def angles(self, positions_BT: Tensor) -> Rotation:
        """The rotations of these positions, for attention and indexer."""
        return rotation(positions_BT, self.config.rotary_dim, self.config.rope_theta)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal(0, initializer_range) matrices, unit norms, zero biases; every part does its own."""
        for module in self.modules():
            initialize = getattr(module, "initialize", None)
            if callable(initialize):
                initialize(self.config.initializer_range, generator)

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


def _check_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Raises RequestError; on a GPU the look-up itself would fail, where values are not waited for."""
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        raise RequestError("input_ids must be a tensor [batch, tokens] of integers; use return_tensors='pt'")
    if input_ids.device.type != "cpu" or not input_ids.numel() or torch.compiler.is_compiling():
        return
    least, most = (int(value) for value in input_ids.aminmax())
    if least < 0 or most >= vocab_size:
        wrong = least if least < 0 else most
        raise RequestError(f"input_ids has token id {wrong}; the vocabulary ends at {vocab_size - 1}")


def token_positions(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> TokenPositions:
    """Positions and roles of the tokens of an uncached pass."""
    batch, length = input_ids.shape
    device = input_ids.device
    valid = None
    if attention_mask is not None and not bool(attention_mask.all()):
        valid = attention_mask[:, -length:].bool()
    if position_ids is None:
        if valid is None:
            steps = torch.arange(length, device=device).expand(batch, length)
        else:
            steps = (valid.long().cumsum(dim=1) - 1).clamp(min=0)
        if document_ids is not None:
            steps = steps - _document_starts(document_ids, steps)
        position_ids = steps
    prefix = None
    if prefix_lengths is not None:
        prefix = position_ids < prefix_lengths.to(device).view(batch, 1)
    return TokenPositions(position_ids, valid, prefix, document_ids)


def _document_starts(document_ids: Tensor, steps: Tensor) -> Tensor:
    """The step at which each token's document begins (documents are contiguous)."""
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(first, steps, 0).cummax(dim=1).values
