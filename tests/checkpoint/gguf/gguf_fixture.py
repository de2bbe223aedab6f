"""GGUF files for the tests: raw bytes to damage, and models written as llama.cpp's converter does.

The converter's part uses the `gguf` package's own writer, name maps and quantizers, so that it
shares nothing with the reader but the format.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glm5.checkpoint import names
from glm5.checkpoint.gguf import GgufModel
from glm5.config import ModelConfig
from glm5.model.transformer import GlmForCausalLM
from tests.model_fixture import tiny_model

gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle")

ARCHITECTURES = {"glm_moe_dsa": "glm-dsa", "glm4_moe": "glm4moe", "glm4_moe_lite": "deepseek2"}

# --- raw bytes --------------------------------------------------------------------------------------

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str | bytes, extents: Iterable[int], kind: int = 0, offset: int = 0) -> bytes:
    """A tensor's entry in the header; extents innermost first."""
    extents = list(extents)
    shape = struct.pack(f"<I{len(extents)}Q", len(extents), *extents)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def raw_file(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    version: int = 3,
    num_keys: int | None = None,
    num_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A GGUF file from its parts; counts may lie."""
    keys, tensors = keys or [], tensors or []
    header = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if num_tensors is None else num_tensors,
        len(keys) if num_keys is None else num_keys,
    )
    header += b"".join(keys) + b"".join(tensors)
    return header + b"\0" * (-len(header) % alignment) + data


# --- models -----------------------------------------------------------------------------------------


def lively_model(config: ModelConfig, seed: int = 0) -> GlmForCausalLM:
    """A tiny model whose norms and biases differ from each other, so that a swapped one shows."""
    model = tiny_model(config, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, values in names.state_tensors(model).items():
            if "norm" in name or name.endswith("bias"):
                values.add_(0.1 * torch.randn(values.shape, generator=generator))
    return model


def hf_tensors(model: GlmForCausalLM) -> dict[str, Tensor]:
    tensors = names.state_tensors(model)
    return {p.name: p.of(tensors[p.parameter]).detach() for p in names.pieces(model)}


def load(found: GgufModel) -> GlmForCausalLM:
    """A model filled from a GGUF file."""
    model = GlmForCausalLM(found.config).eval()
    tensors = names.state_tensors(model)
    with torch.no_grad():
        for piece in names.pieces(model):
            piece.of(tensors[piece.parameter]).copy_(found.read(piece.name))
    return model


def converted(model: GlmForCausalLM, *, fuse_qkv: bool = False) -> dict[str, Tensor]:
    """The tensors as llama.cpp's converter names and shapes them."""
    config, stored = model.config, hf_tensors(model)
    if fuse_qkv:
        for name in [name for name in stored if ".q_proj." in name]:
            parts = [stored.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
            stored[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
    banks: dict[str, list[Tensor]] = {}
    for name in [name for name in stored if ".mlp.experts." in name]:
        banks.setdefault(re.sub(r"experts\.\d+", "experts", name), []).append(stored.pop(name))
    stored |= {name: torch.stack(parts) for name, parts in banks.items()}
    for name in [name for name in stored if "kv_b_proj" in name]:
        heads = stored.pop(name).unflatten(0, (config.num_attention_heads, -1))
        keys, values = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        stored[name.replace("kv_b_proj", "k_b_proj")] = keys.transpose(1, 2)
        stored[name.replace("kv_b_proj", "v_b_proj")] = values
    return {_gguf_name(name, config): values for name, values in stored.items()}


def _gguf_name(name: str, config: ModelConfig) -> str:
    name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    base, _, kind = name.rpartition(".")
    if base.endswith("qkv_proj"):
        return f"blk.{base.split('.')[2]}.attn_qkv.{kind}"
    # The map of GLM_DSA is that of DEEPSEEK2 and has the MTP layer's names too.
    arch = gguf.MODEL_ARCH.GLM_DSA if config.uses_mla else gguf.MODEL_ARCH.GLM4_MOE
    blocks = config.num_hidden_layers + config.num_nextn_predict_layers
    found = gguf.get_tensor_name_map(arch, blocks).get_name(base)
    assert found is not None, name
    return f"{found}.{kind}"


def keys_of(config: ModelConfig) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes; names without the architecture."""
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers + config.num_nextn_predict_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": config.rope_theta,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
        "expert_gating_func": 2,
        "leading_dense_block_count": config.num_dense_layers,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": config.routed_scaling_factor,
        "expert_weights_norm": config.norm_topk_prob,
        "nextn_predict_layers": config.num_nextn_predict_layers,
        "rope.dimension_count": config.rotary_dim,
    }
    if not config.uses_mla:
        return keys | {
            "attention.key_length": config.attention_head_dim,
            "attention.value_length": config.attention_head_dim,
        }
    assert config.kv_lora_rank is not None
    keys |= {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_head_dim,
        "attention.value_length_mla": config.v_head_dim,
    }
    if config.q_lora_rank is not None:
        keys["attention.q_lora_rank"] = config.q_lora_rank
    if config.uses_dsa:
        keys |= {
            "attention.indexer.head_count": config.index_n_heads,
            "attention.indexer.key_length": config.index_head_dim,
            "attention.indexer.top_k": config.index_topk,
            "attention.indexer.types": [kind == "full" for kind in config.indexer_types or ()],
        }
    return keys


def write_model(
    path: Path,
    model: GlmForCausalLM,
    kind: str = "F32",
    *,
    keys: dict[str, Any] | None = None,
    tensors: Mapping[str, Tensor | None] | None = None,
    architecture: str | None = None,
    fuse_qkv: bool = False,
    split_max_tensors: int = 0,
) -> Path:
    """Write `model`; `keys` and `tensors` replace those of the conversion, None takes one away."""
    name = architecture or ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(path, name, split_max_tensors=split_max_tensors)
    for label, value in (keys_of(model.config) | (keys or {})).items():
        if value is not None:
            add_key(writer, label if label.startswith("tokenizer.") else f"{name}.{label}", value)
    stored: dict[str, Tensor | None] = {**converted(model, fuse_qkv=fuse_qkv), **(tensors or {})}
    for label, values in stored.items():
        if values is not None:
            add_tensor(writer, label, values.numpy(), kind)
    finish(writer)
    return path


def add_key(writer: Any, name: str, value: Any) -> None:
    add: Callable[[str, Any], None] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
        list: writer.add_array,
    }[type(value)]  # fmt: skip
    add(name, value)


def add_tensor(writer: Any, name: str, values: np.ndarray, kind: str) -> None:
    """Quantized where its rows allow it; norms, biases and routers stay fp32, as llama.cpp has them."""
    number = gguf.GGMLQuantizationType[kind]
    block = gguf.GGML_QUANT_SIZES[number][0]
    if values.ndim < 2 or values.shape[-1] % block or "ffn_gate_inp" in name:
        writer.add_tensor(name, np.ascontiguousarray(values))
    else:
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(values), number), raw_dtype=number)


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
