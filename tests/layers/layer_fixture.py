"""Small models of every kind of attention whose layers run whole in the native library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm5.config import ModelConfig
from glm5.formats.packed import Scheme
from glm5.formats.packing import pack
from glm5.layers.packed import PackedExperts, PackedLinear
from glm5.layers.swap import materialize, swap
from glm5.model.transformer import GlmForCausalLM
from tests.model_fixture import tiny_config

KINDS = ["dsa", "mla", "gqa"]
# Widths that whole groups of 32 fill, so that everything can be packed; `odd` ones are those of tiny_config.
_EVEN: dict[str, Any] = {"moe_intermediate_size": 32, "hidden_size": 64, "num_nextn_predict_layers": 0}
_MLA: dict[str, Any] = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip


def config_of(kind: str, *, odd: bool = False, **changes: Any) -> ModelConfig:
    """dsa: MLA with indexers, of which one is shared; mla: without query latent, with biases; gqa."""
    even = {} if odd else _EVEN
    if kind == "gqa":
        return tiny_config("glm4_moe", **{**even, **({} if odd else {"head_dim": 24}), **changes})
    mla = {} if odd else _MLA
    if kind == "mla":
        own = {"q_lora_rank": None, "attention_bias": True}
        return tiny_config("glm4_moe_lite", **{**even, **mla, **own, **changes})
    shared = {"indexer_types": ["full", "full", "shared"]}
    index = {} if odd else {"index_head_dim": 32}
    return tiny_config("glm_moe_dsa", **{**even, **mla, **index, **shared, **changes})


def native_model(
    config: ModelConfig, scheme: Scheme | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> GlmForCausalLM:
    """Random weights; with a scheme every linear layer and expert that whole groups fill is packed."""
    generator = torch.Generator().manual_seed(seed)
    device = torch.device("cpu")
    with torch.device("meta"):
        model = GlmForCausalLM(config)
    swap(model, device, None if scheme is None else (lambda name: _scheme(name, scheme)))
    materialize(model, dtype, device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1, generator=generator)
        for module in model.modules():
            if isinstance(module, PackedLinear):
                _fill(module.words, module.scales, module.scheme, module.in_features, generator)
            elif isinstance(module, PackedExperts):
                for expert in range(module.num_experts):
                    for projection in ("gate_proj", "up_proj", "down_proj"):
                        packed = module.packed(expert, projection)
                        _fill(*packed, module.scheme, module.shape(projection)[1], generator)
    return model.eval()


def _scheme(name: str, scheme: Scheme) -> Scheme | None:
    return None if name.rpartition(".")[2] in ("gate", "embed_tokens") else scheme


def _fill(words: Tensor, scales: Tensor, scheme: Scheme, columns: int, generator: torch.Generator) -> None:
    half = 1 << (scheme.bits - 1)
    codes = torch.randint(-half, half, (words.shape[0], columns), generator=generator)
    words.copy_(pack(codes.to(torch.int8), scheme.bits))
    scales.copy_((torch.rand(scales.shape, generator=generator) * 0.2 + 0.2) / half)
