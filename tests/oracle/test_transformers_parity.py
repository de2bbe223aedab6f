"""Our network and our files against `transformers` 5.24, which we did not write.

Random weights, none of them degenerate (norms, biases and router biases too), 32 index heads so
that no two index scores tie (LIMITS, "Notes on the oracle"), `rms_norm_eps` far from the 1e-6 of
the latent norms so that a mix-up shows. A difference is max |a - b| / std(b) over the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config, PreTrainedModel
from transformers.modeling_layers import MtpModel
from transformers.utils import logging as transformers_logging

from glm5.checkpoint import ShardIndex, save_model
from glm5.checkpoint.writing import stored_config
from glm5.config import MODEL_TYPES, ModelConfig
from glm5.layers.loading import load_model
from glm5.model.transformer import GlmForCausalLM, token_positions
from tests.model_fixture import random_ids, tiny_config, tiny_model

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

TOLERANCE = 1e-4
TOPK = 8
VOCAB = 192
LENGTHS = (5, TOPK, TOPK + 1, 47)
types = pytest.mark.parametrize("model_type", MODEL_TYPES)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- what the tests are made of -----------------------------------------------------------------


def stir(model: nn.Module, seed: int) -> None:
    """Random values for every saved tensor, std 0.1; norm weights around 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data.normal_(0.0, 0.1, generator=generator)
        if name.endswith("norm.weight"):
            tensor.data.add_(1.0)


def theirs(model_type: str, seed: int, **changes: Any) -> PreTrainedModel:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    if model_type == "glm4_moe":
        sizes |= {"num_key_value_heads": 2, "head_dim": 24}
    else:
        sizes |= {"q_lora_rank": 48, "kv_lora_rank": 32, "v_head_dim": 20}
        sizes |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
    if model_type == "glm_moe_dsa":
        sizes |= {"index_topk": TOPK, "index_n_heads": 32, "index_head_dim": 12}
    config = AutoConfig.for_model(model_type, **{**sizes, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    stir(model, seed)
    if config.tie_word_embeddings:
        model.tie_weights()
    return model


def ours(directory: Path, **changes: Any) -> GlmForCausalLM:
    """Read a directory in fp32, with the latent eps that transformers has hard-wired."""
    config = ModelConfig.from_pretrained(directory).with_changes(latent_norm_eps=1e-6, **changes)
    return load_model(directory, dtype=torch.float32, config=config)


def our_random(model_type: str, seed: int, **changes: Any) -> GlmForCausalLM:
    changes = {"rms_norm_eps": 1e-2, "latent_norm_eps": 1e-6, **changes}
    if model_type == "glm_moe_dsa":
        changes["index_n_heads"] = 32
    model = tiny_model(tiny_config(model_type, **changes))
    stir(model, seed)
    return model


def read_by_transformers(directory: Path, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, **options
    )
    return model.eval(), info


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.std()).item()


def assert_same_logits(
    ours: GlmForCausalLM, theirs: PreTrainedModel, seed: int, lengths: tuple[int, ...] = LENGTHS
) -> None:
    for length in lengths:
        ids = random_ids(2, length, VOCAB, seed)
        assert difference(ours(ids).logits, theirs(ids).logits) < TOLERANCE, f"length {length}, seed {seed}"


# --- 1. theirs written, ours read -----------------------------------------------------------------

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dsa": ("glm_moe_dsa", {}),
    "dsa-index-share": ("glm_moe_dsa", {"indexer_types": ["full", "shared", "full", "shared"]}),
    "dsa-index-share-long": ("glm_moe_dsa", {"indexer_types": ["full", "shared", "shared", "shared"]}),
    "dsa-groups": ("glm_moe_dsa", {"n_group": 4, "topk_group": 2}),
    "dsa-bias": ("glm_moe_dsa", {"attention_bias": True, "norm_topk_prob": False}),
    "dsa-tied": ("glm_moe_dsa", {"tie_word_embeddings": True, "first_k_dense_replace": 2}),
    "4.5": ("glm4_moe", {}),
    "4.5-qk-norm": ("glm4_moe", {"use_qk_norm": True}),
    "4.5-bias": ("glm4_moe", {"attention_bias": True}),
    "4.5-qk-norm-bias": ("glm4_moe", {"use_qk_norm": True, "attention_bias": True}),
    "4.5-groups": ("glm4_moe", {"n_group": 2, "topk_group": 1, "use_qk_norm": True}),
    "4.7-flash": ("glm4_moe_lite", {}),
    "4.7-flash-groups": ("glm4_moe_lite", {"n_group": 4, "topk_group": 3}),
    "4.7-flash-plain-query": ("glm4_moe_lite", {"q_lora_rank": None}),
    "4.7-flash-half-split": ("glm4_moe_lite", {"rope_interleave": False, "attention_bias": True}),
}
cases = pytest.mark.parametrize("case", CASES)
seeds = pytest.mark.parametrize("seed", range(3))


@cases
@seeds
def test_a_checkpoint_of_transformers_gives_the_same_logits(case: str, seed: int, tmp_path: Path) -> None:
    model_type, changes = CASES[case]
    judge = theirs(model_type, seed, **changes)
    judge.save_pretrained(tmp_path, max_shard_size="100KB" if seed else "1GB")
    assert_same_logits(ours(tmp_path), judge, seed)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("case", ["dsa-index-share", "4.7-flash"])
def test_both_forms_of_mla_give_the_same_logits(case: str, form: str, tmp_path: Path) -> None:
    judge = theirs(CASES[case][0], 3, **CASES[case][1])
    judge.save_pretrained(tmp_path)
    model = ours(tmp_path)
    for layer in model.model.layers:
        layer.self_attn.form = form
    assert_same_logits(model, judge, 3)


def test_the_selection_decides_these_logits(tmp_path: Path) -> None:
    """The comparison above can see a wrong selection: attending to every token is far off."""
    judge = theirs("glm_moe_dsa", 0)
    judge.save_pretrained(tmp_path)
    dense = ours(tmp_path, index_topk=max(LENGTHS))
    ids = random_ids(2, max(LENGTHS), VOCAB)
    assert difference(dense(ids).logits, judge(ids).logits) > 0.1


@types
def test_fused_experts_of_transformers_give_the_same_logits(model_type: str, tmp_path: Path) -> None:
    judge = theirs(model_type, 4)
    judge.save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in ShardIndex(tmp_path)
    assert_same_logits(ours(tmp_path), judge, 4)


@types
def test_left_padding_gives_the_same_logits(model_type: str, tmp_path: Path) -> None:
    judge = theirs(model_type, 5)
    judge.save_pretrained(tmp_path)
    ids, mask = random_ids(3, 40, VOCAB), torch.ones(3, 40, dtype=torch.int64)
    mask[1, :7], mask[2, :31] = 0, 0
    got, wanted = ours(tmp_path)(ids, mask).logits, judge(ids, attention_mask=mask).logits
    assert difference(got[mask == 1], wanted[mask == 1]) < TOLERANCE


# --- 2. ours written, theirs read -----------------------------------------------------------------

SHARED_SELECTION = {"indexer_types": ["full", "shared", "full"]}
WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "dsa": ("glm_moe_dsa", {}),
    "dsa-index-share": ("glm_moe_dsa", {**SHARED_SELECTION, "n_group": 4, "topk_group": 2}),
    "dsa-bias-tied": ("glm_moe_dsa", {"attention_bias": True, "tie_word_embeddings": True}),
    "dsa-dense-between": ("glm_moe_dsa", {"mlp_layer_types": ["sparse", "dense", "sparse"]}),
    "4.5": ("glm4_moe", {"first_k_dense_replace": 2}),
    "4.5-plain": ("glm4_moe", {"use_qk_norm": False, "attention_bias": False}),
    "4.7-flash": ("glm4_moe_lite", {"first_k_dense_replace": 0}),
    "4.7-flash-plain-query": ("glm4_moe_lite", {"q_lora_rank": None, "n_group": 2, "topk_group": 1}),
}


@pytest.mark.parametrize("stored", ["fp32", "bf16"])
@pytest.mark.parametrize("case", WRITTEN)
def test_transformers_reads_what_we_write(case: str, stored: str, tmp_path: Path) -> None:
    model = our_random(WRITTEN[case][0], seed=6, **WRITTEN[case][1])
    save_model(model, tmp_path, stored=stored, shard_bytes=100_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 5

    judge, info = read_by_transformers(tmp_path)

    assert not info["missing_keys"] and not info["mismatched_keys"]
    # Real sizes' MTP layers (78, 46, 92, 47) are in its list of tensors to ignore, layer 3 is not.
    assert all(name.startswith("model.layers.3.") for name in info["unexpected_keys"])
    assert_same_logits(ours(tmp_path), judge, seed=6)
    if stored == "fp32":
        assert_same_logits(model, judge, seed=6)


# --- 3. the official FP8 --------------------------------------------------------------------------

# Widths with a part-full last block, like the 576 rows of kv_a_proj_with_mqa. transformers divides a
# width by its number of scales to find the block, so it can only judge the widths that come out even.
RAGGED = {"hidden_size": 168, "intermediate_size": 300, "moe_intermediate_size": 136, "q_lora_rank": 130}
EVEN = {"hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128, "q_lora_rank": 128}
EVEN |= {"kv_lora_rank": 96, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
QUANTIZED = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "wq_b", "wk"}
QUANTIZED |= {"gate_proj", "up_proj", "down_proj"}


def dequantized_copy(model: GlmForCausalLM, source: Path, target: Path) -> None:
    """The fp32 checkpoint that an FP8 one stands for, by code that shares nothing with ours."""
    tensors: dict[str, Tensor] = {}
    for path in source.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        plain[name] = tensor.float()
        if tensor.dtype == torch.float8_e4m3fn:
            scale = torch.kron(tensors[name + "_scale_inv"], torch.ones(128, 128))
            plain[name] *= scale[: tensor.shape[0], : tensor.shape[1]]
    stored_config(model.config, "fp32").save_pretrained(target)
    save_file(plain, target / "model.safetensors")


@types
def test_fp8_is_read_as_code_times_scale(model_type: str, tmp_path: Path) -> None:
    model = our_random(model_type, seed=7, **RAGGED)
    save_model(model, tmp_path / "fp8", stored="fp8", shard_bytes=300_000)
    dequantized_copy(model, tmp_path / "fp8", tmp_path / "fp32")

    read, wanted = ours(tmp_path / "fp8"), ours(tmp_path / "fp32")

    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, wanted.state_dict()[name]), name
        original = model.state_dict()[name]
        # Codes step by at most 32 at the block's peak of 448; bf16 keeps 8 bits.
        assert (tensor - original).abs().max() <= original.abs().max() * 16 / 448 + 1e-6, name
    ids = random_ids(2, 47, VOCAB)
    judge, _ = read_by_transformers(tmp_path / "fp32")
    assert difference(read(ids).logits, judge(ids).logits) < TOLERANCE


def test_fp8_covers_the_tensors_of_the_official_checkpoints(tmp_path: Path) -> None:
    save_model(our_random("glm_moe_dsa", seed=8), tmp_path, stored="fp8")
    index = ShardIndex(tmp_path)
    for name in index.names:
        module = name.removesuffix(".weight").rpartition(".")[2]
        assert (index[name].dtype_name == "F8_E4M3") == (module in QUANTIZED), name
        if name.endswith(("_scale_inv", "correction_bias")):
            assert index[name].dtype_name == "F32"


@types
def test_transformers_reads_our_fp8(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It asks whether accelerate is there, but needs nothing of it to dequantize on a CPU.
    quantizer = "transformers.quantizers.quantizer_finegrained_fp8"
    monkeypatch.setattr(f"{quantizer}.is_accelerate_available", lambda: True)
    index = {"index_head_dim": 48} if model_type == "glm_moe_dsa" else {}
    save_model(our_random(model_type, 9, **EVEN, **index), tmp_path, stored="fp8", shard_bytes=1_000_000)

    judge, info = read_by_transformers(tmp_path, quantization_config=FineGrainedFP8Config(dequantize=True))

    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(name.startswith("model.layers.3.") for name in info["unexpected_keys"])
    assert_same_logits(ours(tmp_path), judge, seed=9)


# --- 4. multi-token prediction --------------------------------------------------------------------


def their_mtp(judge: PreTrainedModel, depth: int) -> MtpModel:
    """The MTP layers of the directory `judge` was read from."""
    first = judge.config.num_hidden_layers
    # What a real size has in its class: the names of the layers that are not the model's own.
    judge._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{first + k}\." for k in range(depth)]
    judge.config.num_mtp_layers, judge.config.mtp_mlp_layer_types = depth, ["sparse"] * depth
    # glm_moe_dsa is not prepared for MTP: its mask name is unknown there and its layers return pairs.
    judge.config.layer_types = None
    mtp = MtpModel.from_pretrained(judge).eval()
    for layer in mtp.layers:
        layer.mtp_block.register_forward_hook(lambda _, __, out: out[0] if isinstance(out, tuple) else out)
    return mtp


def draft(model: GlmForCausalLM, step: int, hidden: Tensor, next_ids: Tensor) -> Tensor:
    embedding = model.model.embed_tokens(next_ids)
    return model.mtp[step](hidden, embedding, model.step(token_positions(next_ids)))


@types
@pytest.mark.parametrize("seed", [10, 11])
def test_mtp_drafts_the_same_logits(model_type: str, seed: int, tmp_path: Path) -> None:
    """Both steps of a two-layer chain, on the model's own (identical) hidden states.

    transformers counts a draft's positions from 1 and ours from 0: rotary embedding is relative.
    """
    save_model(our_random(model_type, seed, num_nextn_predict_layers=2), tmp_path, stored="fp32")
    model = ours(tmp_path)
    judge, _ = read_by_transformers(tmp_path, attn_implementation="eager")
    ids = random_ids(2, 48, VOCAB, seed)
    seen, next_ids, positions = ids[:, :-1], ids[:, 1:], torch.arange(1, 48).expand(2, -1)
    hidden = model(seen).hidden
    their_hidden = judge(seen, output_hidden_states=True).hidden_states[-1]
    assert difference(hidden, their_hidden) < TOLERANCE  # theirs is after the final norm, too
    mtp = their_mtp(judge, depth=2)

    first = draft(model, 0, hidden, next_ids)
    their_first = mtp.forward_layer(0, their_hidden, positions, None, input_ids=next_ids)
    assert difference(model.lm_head(first), mtp.shared_head(their_first)) < TOLERANCE

    drafted, their_logits, _ = mtp(next_ids, their_hidden, None, positions, None)
    second = draft(model, 1, first, torch.cat((next_ids[:, 1:], drafted[:, :1]), dim=1))
    our_logits = torch.stack((model.lm_head(first[:, -1]), model.lm_head(second[:, -1])), dim=1)
    assert torch.equal(our_logits.argmax(dim=-1), drafted)
    assert difference(our_logits, their_logits) < TOLERANCE
