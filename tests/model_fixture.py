"""Tiny models of every published type, with seeded random weights, for the tests of the network.

The widths are all different on purpose (query, value, latent, index head): a swapped one fails.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from glm5.config import MODEL_TYPES, ModelConfig
from glm5.model.transformer import GlmForCausalLM

_SHARED: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    # Large enough that attention, routing and selection depend on the tokens.
    "initializer_range": 0.1,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
}
_BY_TYPE: dict[str, dict[str, Any]] = {
    "glm_moe_dsa": {**_MLA, "index_topk": 8, "index_n_heads": 3, "index_head_dim": 12},
    "glm4_moe_lite": _MLA,
    "glm4_moe": {
        "num_key_value_heads": 2,
        "head_dim": 24,
        "attention_bias": True,
        "use_qk_norm": True,
        "rope_parameters": {**_SHARED["rope_parameters"], "partial_rotary_factor": 0.5},
    },
}


def tiny_config(model_type: str = "glm_moe_dsa", **changes: Any) -> ModelConfig:
    """64 wide, 3 layers (the first dense), 8 experts of which 2 run, 8 selected tokens, 1 MTP layer.

    `changes` are keys of `config.json`, unknown ones (`index_topk_freq`) included.
    """
    return ModelConfig.from_dict({"model_type": model_type, **_SHARED, **_BY_TYPE[model_type], **changes})


def tiny_model(config: ModelConfig | None = None, seed: int = 0) -> GlmForCausalLM:
    """An fp32 model in eval mode; the same seed gives the same weights."""
    model = GlmForCausalLM(config or tiny_config())
    generator = torch.Generator().manual_seed(seed)
    model.reset_parameters(generator)
    return model.eval()


def random_ids(batch: int, length: int, vocab_size: int = 256, seed: int = 0) -> Tensor:
    """Token ids [batch, length] from their own seeded generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (batch, length), generator=generator)


@st.composite
def tiny_configs(draw: st.DrawFn) -> ModelConfig:
    """Small valid configs of every type, with the keys that change which tensors exist."""
    model_type = draw(st.sampled_from(MODEL_TYPES))
    layers = draw(st.integers(1, 6))
    changes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "first_k_dense_replace": draw(st.integers(0, 7)),
        "n_shared_experts": draw(st.integers(0, 2)),
        "num_nextn_predict_layers": draw(st.integers(0, 2)),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw(st.floats(1, 1e7))},
        "attention_mask_type": draw(st.sampled_from(["causal", "prefix"])),
    }
    if model_type == "glm4_moe":
        changes["use_qk_norm"] = draw(st.booleans())
    else:
        kinds = st.lists(st.sampled_from(["dense", "sparse"]), min_size=layers, max_size=layers)
        changes["mlp_layer_types"] = draw(st.none() | kinds)
    if model_type == "glm4_moe_lite":
        changes["q_lora_rank"] = draw(st.sampled_from([None, 48]))
    if model_type == "glm_moe_dsa":
        changes["index_topk_freq"] = draw(st.integers(1, 4))
        changes["index_skip_topk_offset"] = draw(st.integers(1, 4))
    return tiny_config(model_type, **changes)
