"""Where each tensor of a Hugging Face checkpoint lies in a GGUF file, and what to undo.

llama.cpp's converter renames everything, stacks a layer's experts, and splits `kv_b_proj` for the
absorbed form; rotary weights it leaves as they are. (conversion/glm.py, deepseek.py, and the names
in gguf-py/gguf/constants.py.)
"""

from __future__ import annotations

import re
from collections.abc import Container
from typing import NamedTuple

from glm5.config import ModelConfig

# model.layers.N.X.weight is blk.N.Y.weight; biases likewise.
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.indexer.wq_b": "indexer.attn_q_b",
    "self_attn.indexer.wk": "indexer.attn_k",
    "self_attn.indexer.k_norm": "indexer.k_norm",
    "self_attn.indexer.weights_proj": "indexer.proj",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "eh_proj": "nextn.eh_proj",
    "shared_head.norm": "nextn.shared_head_norm",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
# Copies of what the model has already, and tables that follow from the configuration.
_BORROWED = re.compile(
    r"rope_freqs\.weight|blk\.\d+\.(attn_rot_embd|nextn\.embed_tokens|nextn\.shared_head_head)\.weight"
)


class Source(NamedTuple):
    """A Hugging Face tensor within a GGUF file.

    tensor: the tensor it lies in; `expert` of the bank, `rows` (first, last) of what is left.
    values: the second half of `kv_b_proj`; None for every other tensor.

    `tensor` as [heads, latent, nope] and `values` as [heads, value, latent] are one matrix, of
    which each head has its keys' rows first: [heads * (nope + value), latent].
    """

    tensor: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    values: str | None = None


def source(name: str, config: ModelConfig, present: Container[str]) -> Source:
    """Where `name` lies, given which tensors the file has; it need not have the one that is named."""
    if name in _OUTSIDE:
        return Source(_OUTSIDE[name])
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias|e_score_correction_bias)", name)
    assert match is not None, name
    block, inner, kind = f"blk.{match[1]}.", match[2], match[3]
    if kind == "e_score_correction_bias":
        return Source(f"{block}exp_probs_b.bias")
    if inner == "self_attn.kv_b_proj":
        return Source(f"{block}attn_k_b.weight", values=f"{block}attn_v_b.weight")
    if inner == "post_attention_layernorm":
        norm = "ffn_norm" if config.uses_mla else "post_attention_norm"
        return Source(f"{block}{norm}.{kind}")
    expert = re.fullmatch(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj", inner)
    if expert is not None:
        return _expert(block, int(expert[1]), expert[2], config, present)
    found = Source(f"{block}{_IN_LAYER[inner]}.{kind}")
    if found.tensor not in present:
        if inner == "shared_head.norm":
            return Source("output_norm.weight")  # as llama.cpp does
        if inner in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            return _fused_qkv(found, f"{block}attn_qkv.{kind}", inner[-6], config, present)
    return found


def _expert(block: str, expert: int, kind: str, config: ModelConfig, present: Container[str]) -> Source:
    fused = f"{block}ffn_gate_up_exps.weight"
    if kind == "down" or fused not in present:
        return Source(f"{block}ffn_{kind}_exps.weight", expert)
    width = config.moe_intermediate_size
    return Source(fused, expert, (0, width) if kind == "gate" else (width, 2 * width))


def _fused_qkv(
    single: Source, fused: str, letter: str, config: ModelConfig, present: Container[str]
) -> Source:
    """Query, key and value rows of one tensor (the converter's `--fuse-qkv`)."""
    if fused not in present:
        return single
    queries = config.num_attention_heads * config.attention_head_dim
    keys = config.num_key_value_heads * config.attention_head_dim
    first = {"q": 0, "k": queries, "v": queries + keys}[letter]
    return Source(fused, rows=(first, first + (queries if letter == "q" else keys)))


def is_borrowed(tensor: str, config: ModelConfig) -> bool:
    """Whether a tensor of the file is rightly left unread."""
    if _BORROWED.fullmatch(tensor):
        return True
    # A layer that shares its selection may still carry an indexer; llama.cpp does not use it either.
    layer = re.match(r"blk\.(\d{1,6})\.indexer\.", tensor)
    return layer is not None and config.uses_dsa and not config.has_indexer(int(layer[1]))
