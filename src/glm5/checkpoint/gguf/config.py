"""The `ModelConfig` of a GGUF file: llama.cpp's metadata keys turned into those of Hugging Face.

Knows which architecture names mean a GLM, which keys llama.cpp requires and what an absent one
means there; what a key cannot say (a bias, a tied head) is seen from the tensors.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from glm5.checkpoint.gguf.file import GgufFile
from glm5.config import ModelConfig
from glm5.errors import CheckpointError, ConfigError

# llama.cpp's architecture to ours. GLM-4.7-Flash has the network of DeepSeek-V2 and its name.
ARCHITECTURES = {"glm-dsa": "glm_moe_dsa", "glm4moe": "glm4_moe", "deepseek2": "glm4_moe_lite"}

# llama_expert_gating_func_type
_SOFTMAX, _SIGMOID = 1, 2
# GLM-5.2 files of before the key `attention.indexer.types` are known by their context length.
_GLM_5_2_CONTEXT = 1048576
_REQUIRED = object()


def model_config(file: GgufFile) -> ModelConfig:
    """The configuration of a GLM model.

    Raises:
        CheckpointError: another architecture, a missing or impossible key, or a feature that no
            GLM release has; the message names the key.
    """
    architecture = file.architecture
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: holds a model of architecture {architecture[:100]!r}, not a GLM; "
            f"glm5 runs {', '.join(ARCHITECTURES)}"
        )
    keys = _Keys(file, architecture)
    raw = _shared(keys)
    if architecture == "glm4moe":
        raw |= _grouped_query(keys)
    else:
        raw |= _latent(keys)
    if architecture == "glm-dsa":
        raw |= _indexer(keys, raw["num_hidden_layers"])
    _refuse_other_networks(keys)
    try:
        return ModelConfig.from_dict(raw)
    except ConfigError as error:
        raise CheckpointError(f"{file.path}: its keys make no GLM model: {error}") from None


class _Keys:
    """Metadata of one architecture, by the key's name without the architecture, checked for type."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file, self.architecture = file, architecture

    def refuse(self, key: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: key {self.architecture}.{key} {what}")

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if value is _REQUIRED:
            raise self.refuse(key, "is missing; convert the model again")
        return value

    def integer(self, key: str, default: Any = _REQUIRED) -> Any:
        """A whole number; a list with one entry a layer counts when all are the same."""
        value = self.get(key, default)
        if isinstance(value, list) and value and all(entry == value[0] for entry in value):
            value = value[0]
        if value is not default and (type(value) is not int or value < 0):
            raise self.refuse(key, f"is {str(value)[:60]!r}; expected one whole number")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self.get(key, default)
        if value is not default and type(value) not in (int, float):
            raise self.refuse(key, f"is {str(value)[:60]!r}; expected a number")
        return _shortest(float(value))

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, f"is {str(value)[:60]!r}; expected a bool")
        return value

    def has_tensor(self, name: str) -> bool:
        return name in self.file.tensors


def _shortest(value: float) -> float:
    """1e-05 for the fp32 nearest to it, which is what a config.json said before the conversion."""
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return float(str(single)) if float(single) == value and math.isfinite(value) else value


def _shared(keys: _Keys) -> dict[str, Any]:
    blocks = keys.integer("block_count")
    mtp = keys.integer("nextn_predict_layers", 0)
    layers = blocks - mtp
    if not keys.has_tensor("blk.0.attn_norm.weight") and mtp:
        raise CheckpointError(
            f"{keys.file.path}: holds only the MTP layers of a model; use the file with the model itself"
        )
    scale = keys.number("expert_weights_scale", 0.0)
    return {
        "model_type": ARCHITECTURES[keys.architecture],
        "vocab_size": _vocab_size(keys.file),
        "hidden_size": keys.integer("embedding_length"),
        "intermediate_size": keys.integer("feed_forward_length"),
        "moe_intermediate_size": keys.integer("expert_feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": keys.integer("attention.head_count"),
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": not keys.has_tensor("output.weight"),
        "rope_parameters": {"rope_type": "default", "rope_theta": keys.number("rope.freq_base")},
        "n_routed_experts": keys.integer("expert_count"),
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "n_shared_experts": keys.integer("expert_shared_count"),
        "n_group": keys.integer("expert_group_count", 1),
        "topk_group": keys.integer("expert_group_used_count", 1),
        "first_k_dense_replace": keys.integer("leading_dense_block_count", 0),
        "norm_topk_prob": keys.flag("expert_weights_norm", False),
        # llama.cpp takes 0, its default, for "no scaling".
        "routed_scaling_factor": scale or 1.0,
        # Conversions for llama.cpp often keep the key and leave the layer out.
        "num_nextn_predict_layers": mtp if keys.has_tensor(f"blk.{layers}.nextn.eh_proj.weight") else 0,
        **_tokens(keys.file),
    }


def _vocab_size(file: GgufFile) -> int:
    """Rows of the embedding; `vocab_size` is a key that not every converter wrote."""
    shape = file.tensor("token_embd.weight").shape
    return shape[0] if shape else 0


def _grouped_query(keys: _Keys) -> dict[str, Any]:
    head_dim = keys.integer("attention.key_length")
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise keys.refuse("attention.value_length", "differs from attention.key_length; no GLM has that")
    rotary = keys.integer("rope.dimension_count")
    if not 0 < rotary <= head_dim:
        raise keys.refuse("rope.dimension_count", f"is {rotary}; a head is {head_dim} wide")
    share = rotary / head_dim
    if int(head_dim * share) != rotary:  # the division rounded down
        share = math.nextafter(share, 1.0)
    theta = keys.number("rope.freq_base")
    return {
        "num_key_value_heads": keys.integer("attention.head_count_kv"),
        "head_dim": head_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": share},
        "attention_bias": any(keys.has_tensor(f"blk.0.{name}.bias") for name in ("attn_q", "attn_qkv")),
        "use_qk_norm": keys.has_tensor("blk.0.attn_q_norm.weight"),
    }


def _latent(keys: _Keys) -> dict[str, Any]:
    # `attention.key_length` and `.head_count_kv` describe the absorbed form, which has one KV head.
    rotary = keys.integer("rope.dimension_count")
    default = _REQUIRED if keys.architecture == "glm-dsa" else 0
    return {
        "num_key_value_heads": keys.integer("attention.head_count"),
        "q_lora_rank": keys.integer("attention.q_lora_rank", default) or None,
        "kv_lora_rank": keys.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": keys.integer("attention.key_length_mla") - rotary,
        "v_head_dim": keys.integer("attention.value_length_mla"),
        "attention_bias": keys.has_tensor("blk.0.attn_kv_a_mqa.bias"),
    }


def _indexer(keys: _Keys, layers: int) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "index_n_heads": keys.integer("attention.indexer.head_count"),
        "index_head_dim": keys.integer("attention.indexer.key_length"),
        "index_topk": keys.integer("attention.indexer.top_k"),
    }
    full = keys.get("attention.indexer.types", None)
    if full is None:
        if keys.integer("context_length") >= _GLM_5_2_CONTEXT:
            raw |= {"index_topk_freq": 4, "index_skip_topk_offset": 3}
        return raw
    if type(full) in (bool, int):
        full = [full] * layers if layers <= 1000 else []
    if not isinstance(full, list) or len(full) != layers or not all(kind in (0, 1) for kind in full):
        raise keys.refuse("attention.indexer.types", f"is not a list of {layers} bools, one a layer")
    return raw | {"indexer_types": ["full" if kind else "shared" for kind in full]}


def _tokens(file: GgufFile) -> dict[str, Any]:
    """The ids that end a turn; `bos_token_id` of these files is [gMASK], which the template writes."""
    ends = []
    for name in ("eos", "eot", "eom"):
        token = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None and token not in ends:
            ends.append(token)
    return {
        "eos_token_id": ends or None,
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _refuse_other_networks(keys: _Keys) -> None:
    """`deepseek2` is also DeepSeek-V2, V3 and Kimi, whose softmax gates or YaRN no GLM has."""
    gate = keys.integer("expert_gating_func", 0)
    # llama.cpp reads softmax from an absent key, but for files it knows to be GLM-4.7-Flash.
    flash = keys.integer("block_count") in (47, 48) and _vocab_size(keys.file) == 154880
    if gate == 0:
        gate = _SIGMOID if keys.architecture != "deepseek2" or flash else _SOFTMAX
    if gate != _SIGMOID:
        raise keys.refuse("expert_gating_func", f"is {gate}; GLM's experts have sigmoid gates, {_SIGMOID}")
    scaling = keys.get("rope.scaling.type", "none")
    if scaling != "none":
        raise keys.refuse("rope.scaling.type", f"is {str(scaling)[:60]!r}; no GLM scales its positions")
    if keys.get("attention.temperature_scale", None) is not None:
        raise keys.refuse("attention.temperature_scale", "is set; no GLM has it")
    if not keys.flag("attention.causal", True):
        raise keys.refuse("attention.causal", "is false; every GLM is causal")
