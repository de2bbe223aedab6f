"""What a configuration may not say: each impossible or contradictory key is refused by name."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from glm5.errors import ConfigError

if TYPE_CHECKING:
    from glm5.config import ModelConfig

# Ten times the deepest published model; a number beyond it is a mistake, or meant to exhaust memory.
MAX_LAYERS = 1000
MAX_SIZE = 1 << 30
_LARGEST = {"n_routed_experts": 1 << 16}


def check_depth(config: ModelConfig) -> None:
    """Refuse a number of layers that nothing could hold."""
    layers, dense = config.num_hidden_layers, config.first_k_dense_replace
    if not 0 < layers <= MAX_LAYERS:
        raise ConfigError(f"num_hidden_layers is {layers}; it must be 1 to {MAX_LAYERS}")
    if dense < 0:
        raise ConfigError(f"first_k_dense_replace is {dense}; it must not be negative")
    if not 0 <= config.num_nextn_predict_layers <= MAX_LAYERS:
        raise ConfigError(
            f"num_nextn_predict_layers is {config.num_nextn_predict_layers}; it must be 0 to {MAX_LAYERS}"
        )


def check(config: ModelConfig) -> None:
    """Raise ConfigError for the first key that is impossible, by itself or beside another."""
    positive = ["vocab_size", "hidden_size", "num_attention_heads"]
    positive += ["num_key_value_heads", "max_position_embeddings"]
    if config.num_dense_layers or "dense" in (config.mlp_layer_types or ()):
        positive.append("intermediate_size")
    if config.num_sparse_layers or config.num_nextn_predict_layers:
        positive += ["moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "n_group"]
        positive.append("topk_group")
    if config.uses_mla:
        positive += ["kv_lora_rank", "qk_rope_head_dim", "v_head_dim"]
    if config.uses_dsa:
        positive += ["q_lora_rank", "index_topk", "index_n_heads", "index_head_dim"]
    for name in positive:
        value = getattr(config, name)
        if not isinstance(value, int) or value <= 0:
            raise ConfigError(f"{name} is {value!r}; it must be a positive integer")
        if value > _LARGEST.get(name, MAX_SIZE):
            shown = value if value < 1 << 64 else "past 2^64"
            raise ConfigError(f"{name} is {shown}; no model has more than {_LARGEST.get(name, MAX_SIZE)}")
    for name in ("rms_norm_eps", "rope_theta", "routed_scaling_factor", "latent_norm_eps"):
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name} is {value!r}; it must be a positive number")
    for name in ("n_shared_experts", "qk_nope_head_dim", "initializer_range"):
        value = getattr(config, name)
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name} is {value!r}; it must not be negative")
    if config.uses_mla and config.q_lora_rank is not None and config.q_lora_rank <= 0:
        raise ConfigError(f"q_lora_rank is {config.q_lora_rank}; it must be a positive integer or null")
    if config.head_dim is not None and config.head_dim <= 0:
        raise ConfigError(f"head_dim is {config.head_dim}; it must be a positive integer")
    if config.attention_head_dim <= 0:
        raise ConfigError(
            f"hidden_size {config.hidden_size} leaves no width for num_attention_heads "
            f"{config.num_attention_heads}; give a head_dim"
        )
    if not 0 < config.partial_rotary_factor <= 1:
        raise ConfigError(f"partial_rotary_factor is {config.partial_rotary_factor}; it must be in (0, 1]")
    if config.uses_mla and config.partial_rotary_factor != 1:
        raise ConfigError(
            f"partial_rotary_factor is {config.partial_rotary_factor}; with MLA, qk_rope_head_dim says what "
            "is rotated: set it to 1.0"
        )
    if config.attention_dropout != 0:
        raise ConfigError(f"attention_dropout is {config.attention_dropout}; only 0 is supported")
    if config.hidden_act != "silu":
        raise ConfigError(f"hidden_act is {config.hidden_act!r}; only silu is supported")
    if config.attention_mask_type not in ("causal", "prefix"):
        raise ConfigError(
            f"attention_mask_type is {config.attention_mask_type!r}; it must be causal or prefix"
        )
    if config.rotary_dim <= 0 or config.rotary_dim % 2:
        raise ConfigError(f"the rotary width is {config.rotary_dim}; it must be positive and even")
    if not config.uses_mla and config.num_attention_heads % config.num_key_value_heads:
        raise ConfigError(
            f"num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    _check_layer_lists(config)
    if (
        config.model_type == "glm4_moe"
        and "dense" in (config.mlp_layer_types or ())[config.num_dense_layers :]
    ):
        raise ConfigError("mlp_layer_types has a dense layer after a sparse one; glm4_moe cannot say so")
    if config.num_sparse_layers or config.num_nextn_predict_layers:
        _check_experts(config)
    if config.uses_dsa and config.index_head_dim < config.qk_rope_head_dim:
        raise ConfigError(
            f"index_head_dim {config.index_head_dim} is smaller than "
            f"qk_rope_head_dim {config.qk_rope_head_dim}, which it must hold"
        )


def _check_layer_lists(config: ModelConfig) -> None:
    for name, allowed in (
        ("mlp_layer_types", {"dense", "sparse"}),
        ("indexer_types", {"full", "shared"}),
    ):
        kinds = getattr(config, name)
        if kinds is None:
            continue
        if len(kinds) != config.num_hidden_layers:
            raise ConfigError(
                f"{name} has {len(kinds)} entries, num_hidden_layers is {config.num_hidden_layers}"
            )
        wrong = next((k for k in kinds if not isinstance(k, str) or k not in allowed), None)
        if wrong is not None:
            raise ConfigError(f"{name} has an entry {wrong!r}; allowed are {', '.join(sorted(allowed))}")
    if config.uses_dsa and config.indexer_types and config.indexer_types[0] != "full":
        raise ConfigError("indexer_types starts with 'shared'; layer 0 has no lower layer to share with")


def _check_experts(config: ModelConfig) -> None:
    if config.num_experts_per_tok > config.n_routed_experts:
        raise ConfigError(
            f"num_experts_per_tok {config.num_experts_per_tok} is more than "
            f"n_routed_experts {config.n_routed_experts}"
        )
    if config.n_routed_experts % config.n_group:
        raise ConfigError(
            f"n_routed_experts {config.n_routed_experts} is not a multiple of n_group {config.n_group}"
        )
    if config.topk_group > config.n_group:
        raise ConfigError(f"topk_group {config.topk_group} is more than n_group {config.n_group}")
    per_group = config.n_routed_experts // config.n_group
    if config.n_group > 1 and per_group < 2:
        raise ConfigError(f"n_group {config.n_group} leaves {per_group} expert a group; 2 are needed")
    if config.num_experts_per_tok > config.topk_group * per_group:
        raise ConfigError(
            f"num_experts_per_tok {config.num_experts_per_tok} is more than the "
            f"{config.topk_group * per_group} experts of topk_group {config.topk_group} groups"
        )
    for key, only in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("moe_layer_freq", 1)):
        value = config.extra.get(key, only)
        if value not in (None, only):
            raise ConfigError(f"{key} is {value!r}; only {only} is supported")
