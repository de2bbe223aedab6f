"""A random slice at GLM-5's width for the speed benchmarks, in int4, and the same sizes as a GGUF.

Real sizes of everything but depth and vocabulary: hidden 6144, 256 experts of 2048, top-8, MLA and
DSA. Weights are random codes; what matters for speed is how many bytes are read and that different
tokens choose different experts, so the router and the embeddings get a wide spread and the
benchmarks count the experts that ran.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from glm5.config import ModelConfig
from glm5.layers.packed import PackedExperts, PackedLinear
from glm5.layers.swap import materialize, swap
from glm5.model.transformer import GlmForCausalLM
from glm5.quantize import Recipe
from glm5.runtime.cache import Cache

VOCABULARY = 8192
GIGA = 1e9


def slice_config(moe_layers: int) -> ModelConfig:
    """One dense layer, then `moe_layers` of experts; every layer has an indexer of its own."""
    layers = 1 + moe_layers
    return ModelConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        first_k_dense_replace=1,
        indexer_types=("full",) * layers,
        num_nextn_predict_layers=0,
        max_position_embeddings=1 << 18,
        eos_token_id=0,
    )


def random_slice(moe_layers: int, seed: int = 0, device: torch.device | None = None) -> GlmForCausalLM:
    """The slice in bf16 and packed int4, group 64."""
    config, device = slice_config(moe_layers), device or torch.device("cpu")
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = GlmForCausalLM(config)
    swap(model, device, Recipe().scheme_of)
    materialize(model, torch.bfloat16, device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight") or "layernorm" in name:
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            elif name.endswith("embed_tokens.weight"):
                parameter.normal_(0.0, 1.0)
            elif name.endswith("mlp.gate.weight"):
                parameter.normal_(0.0, 0.05)
            else:
                parameter.normal_(0.0, 0.02)
        for module in model.modules():
            if isinstance(module, PackedExperts):
                _random_bytes(module.bytes)
                for expert in range(module.num_experts):
                    for projection in ("gate_proj", "up_proj", "down_proj"):
                        module.packed(expert, projection).scales.fill_(0.004)
            elif isinstance(module, PackedLinear):
                _random_bytes(module.words)
                # Codes average -1/2: with scales of one sign attention's layers would add that up over all
                # columns, and every token would look alike to the router.
                module.scales.copy_((torch.rand(module.scales.shape) < 0.5) * 0.008 - 0.004)
    return model.eval()


def _random_bytes(target: torch.Tensor) -> None:
    """A short random stretch, repeated: made in seconds, and no two rows of a matrix alike."""
    flat = target.view(-1).view(torch.uint8)
    stretch = torch.randint(0, 256, (min(flat.numel(), 16_777_259),), dtype=torch.uint8)
    for start in range(0, flat.numel(), stretch.numel()):
        piece = flat[start : start + stretch.numel()]
        piece.copy_(stretch[: piece.numel()])


def step_bytes(model: GlmForCausalLM, chosen: dict[int, int], context: int) -> int:
    """Bytes one decode step must read. chosen: distinct experts of each layer that ran."""
    config = model.config
    total = model.lm_head.weight.numel() * 2
    for index, layer in enumerate(model.model.layers):
        for name, module in layer.named_modules():
            if isinstance(module, PackedLinear):
                total += module.words.numel() * 4 + module.scales.numel() * 2
            elif isinstance(module, PackedExperts):
                total += chosen[index] * module.bytes_per_expert
            elif isinstance(module, torch.nn.Linear):
                total += module.weight.numel() * 2
            elif name.endswith("mlp.gate"):
                total += module.weight.numel() * module.weight.element_size()
        assert config.kv_lora_rank is not None and config.index_topk is not None
        total += min(context, config.index_topk) * (config.kv_lora_rank + config.qk_rope_head_dim) * 2
        total += context * config.index_head_dim * 2 if context > config.index_topk else 0
    return total


def filled_cache(model: GlmForCausalLM, context: int, room: int = 1) -> Cache:
    """A cache that holds `context` random tokens and takes `room` more."""
    cache = Cache(model.config, 1, context + room, dtype=model.dtype, device=model.device)
    for layer in cache.pool.layers.values():
        for buffer in layer.buffers:
            buffer.normal_()
    cache.sequences[0].length = context
    return cache


def write_gguf(path: Path, moe_layers: int, seed: int = 0) -> None:
    """The same sizes in llama.cpp's Q4_0 (needs the `gguf` package)."""
    import gguf
    import numpy as np

    config = slice_config(moe_layers)
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "glm-dsa", use_temp_file=True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GLM_DSA, config.num_hidden_layers)
    _metadata(writer, config)
    stretch = random.integers(0, 256, size=(1 << 20, 18), dtype=np.uint8)
    stretch[:, :2] = np.frombuffer(np.float16(0.004).tobytes(), dtype=np.uint8)

    def add(name: str, *shape: int, plain: bool = False) -> None:
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        if plain:
            writer.add_tensor(found, random.normal(0.0, 0.02, shape).astype(np.float32))
            return
        blocks = int(np.prod(shape)) // 32
        values = np.resize(stretch, (blocks, 18)).reshape(*shape[:-1], shape[-1] // 32 * 18)
        writer.add_tensor(found, values, raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    hidden, heads = config.hidden_size, config.num_attention_heads
    rank, rope, nope, value = 512, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim
    add("model.embed_tokens.weight", VOCABULARY, hidden)
    add("lm_head.weight", VOCABULARY, hidden)
    add("model.norm.weight", hidden, plain=True)
    for layer in range(config.num_hidden_layers):
        at, attention = f"model.layers.{layer}", f"model.layers.{layer}.self_attn"
        add(f"{at}.input_layernorm.weight", hidden, plain=True)
        add(f"{at}.post_attention_layernorm.weight", hidden, plain=True)
        add(f"{attention}.q_a_proj.weight", 2048, hidden)
        add(f"{attention}.q_a_layernorm.weight", 2048, plain=True)
        add(f"{attention}.q_b_proj.weight", heads * (nope + rope), 2048)
        add(f"{attention}.kv_a_proj_with_mqa.weight", rank + rope, hidden)
        add(f"{attention}.kv_a_layernorm.weight", rank, plain=True)
        add(f"{attention}.k_b_proj.weight", heads, rank, nope)
        add(f"{attention}.v_b_proj.weight", heads, value, rank)
        add(f"{attention}.o_proj.weight", hidden, heads * value)
        add(f"{attention}.indexer.wq_b.weight", 32 * 128, 2048)
        add(f"{attention}.indexer.wk.weight", 128, hidden)
        add(f"{attention}.indexer.k_norm.weight", 128, plain=True)
        add(f"{attention}.indexer.k_norm.bias", 128, plain=True)
        add(f"{attention}.indexer.weights_proj.weight", 32, hidden, plain=True)
        if layer == 0:
            for projection in ("gate_proj", "up_proj"):
                add(f"{at}.mlp.{projection}.weight", config.intermediate_size, hidden)
            add(f"{at}.mlp.down_proj.weight", hidden, config.intermediate_size)
            continue
        width, experts = config.moe_intermediate_size, config.n_routed_experts
        add(f"{at}.mlp.gate.weight", experts, hidden, plain=True)
        add(f"{at}.mlp.gate.e_score_correction.bias", experts, plain=True)
        for projection in ("gate_proj", "up_proj"):
            add(f"{at}.mlp.experts.{projection}.weight", experts, width, hidden)
            add(f"{at}.mlp.shared_experts.{projection}.weight", width, hidden)
        add(f"{at}.mlp.experts.down_proj.weight", experts, hidden, width)
        add(f"{at}.mlp.shared_experts.down_proj.weight", hidden, width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(writer: Any, config: ModelConfig) -> None:
    rank = config.kv_lora_rank or 0
    numbers: dict[str, int] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_group_count": 1,
        "expert_group_used_count": 1,
        "expert_gating_func": 2,
        "leading_dense_block_count": 1,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": 1,
        "nextn_predict_layers": 0,
        "rope.dimension_count": config.qk_rope_head_dim,
        "vocab_size": config.vocab_size,
        "attention.q_lora_rank": config.q_lora_rank or 0,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + config.qk_rope_head_dim,
        "attention.value_length": rank,
        "attention.key_length_mla": config.qk_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "attention.indexer.head_count": config.index_n_heads,
        "attention.indexer.key_length": config.index_head_dim,
        "attention.indexer.top_k": config.index_topk or 0,
    }
    for name, number in numbers.items():
        writer.add_uint32(f"glm-dsa.{name}", number)
    writer.add_float32("glm-dsa.rope.freq_base", config.rope_theta)
    writer.add_float32("glm-dsa.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32("glm-dsa.expert_weights_scale", config.routed_scaling_factor)
    writer.add_bool("glm-dsa.expert_weights_norm", True)
    writer.add_array("glm-dsa.attention.indexer.types", [True] * config.num_hidden_layers)
    writer.add_string("tokenizer.ggml.model", "none")


def benchmark_arguments(description: str, quick: str) -> argparse.Namespace:
    """--quick, --llama-bench, --moe-layers and --threads; `quick` says what --quick leaves out."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--moe-layers", type=int, default=1, help="5.2 GB each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def llama_rates(program: Path, moe_layers: int, threads: int, runs: list[list[str]]) -> list[float]:
    """llama.cpp's tokens/s on a Q4_0 file of the same sizes, one figure for each run's options."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slice.gguf"
        write_gguf(path, moe_layers)
        found = []
        for options in runs:
            command = [str(program), "-m", str(path), "-t", str(threads), "-o", "json", *options]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{program}: {done.stderr.strip().splitlines()[-1]}")
            found.append(float(json.loads(done.stdout)[0]["avg_ts"]))
        return found
