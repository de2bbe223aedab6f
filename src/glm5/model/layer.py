"""A decoder layer: pre-norm attention and feed-forward, each added to the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from glm5.config import ModelConfig
from glm5.model.attention import GroupedQueryAttention, MultiHeadLatentAttention
from glm5.model.indexer import Selection
from glm5.model.moe import MLP, MixtureOfExperts
from glm5.model.norms import RMSNorm
from glm5.model.step import Step


class DecoderLayer(nn.Module):
    """One of the three parts that may be replaced whole; it is made of its parts, whatever they are."""

    def __init__(
        self,
        index: int,
        self_attn: MultiHeadLatentAttention | GroupedQueryAttention,
        mlp: MixtureOfExperts | MLP,
        input_layernorm: RMSNorm,
        post_attention_layernorm: RMSNorm,
    ) -> None:
        super().__init__()
        self.index = index
        self.self_attn, self.mlp = self_attn, mlp
        self.input_layernorm, self.post_attention_layernorm = input_layernorm, post_attention_layernorm

    def parts(
        self,
    ) -> tuple[
        int, MultiHeadLatentAttention | GroupedQueryAttention, MixtureOfExperts | MLP, RMSNorm, RMSNorm
    ]:
        """What `__init__` takes, for a layer that takes the place of this one."""
        return self.index, self.self_attn, self.mlp, self.input_layernorm, self.post_attention_layernorm

    @classmethod
    def of(cls, config: ModelConfig, index: int) -> DecoderLayer:
        """Layer `index` as the config has it; MTP layers are past the last one."""
        attention = MultiHeadLatentAttention if config.uses_mla else GroupedQueryAttention
        hidden, eps = config.hidden_size, config.rms_norm_eps
        sparse = config.is_sparse(index)
        mlp = MixtureOfExperts(config, index) if sparse else MLP(hidden, config.intermediate_size)
        return cls(index, attention(config, index), mlp, RMSNorm(hidden, eps), RMSNorm(hidden, eps))

    def forward(
        self, x_BTD: Tensor, step: Step, selection: Selection | None
    ) -> tuple[Tensor, Selection | None]:
        """The stream behind the layer, and the slots chosen for the layers that share them."""
        attended, selection = self.self_attn(self.input_layernorm(x_BTD), step, selection)
        x_BTD = x_BTD + attended
        x_BTD = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD), step.probe)
        if step.probe is not None:
            step.probe.hidden(self.index, x_BTD)
        return x_BTD, selection
