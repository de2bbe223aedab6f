"""A model converted as llama.cpp does it comes back: config, names, weights, logits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glm5.checkpoint.gguf import GgufFile, GgufModel
from glm5.checkpoint.gguf.blocks import TYPES
from glm5.checkpoint.gguf.config import ARCHITECTURES, model_config
from glm5.checkpoint.gguf.header import GgufTensor
from glm5.config import MODEL_TYPES, ModelConfig
from glm5.config.presets import PRESETS
from glm5.errors import CheckpointError
from tests.checkpoint.checkpoint_fixture import refused
from tests.checkpoint.gguf.gguf_fixture import (
    converted,
    gguf,
    hf_tensors,
    keys_of,
    lively_model,
    load,
    raw_file,
    write_model,
)  # fmt: skip
from tests.model_fixture import random_ids, tiny_config

# What GGUF does not carry: how the weights were made, other spellings of `indexer_types`, and how MTP
# steps may share work.
NOT_STORED = {
    "initializer_range",
    "dtype",
    "index_topk_freq",
    "index_skip_topk_offset",
    "index_share_for_mtp_iteration",
}

VARIANTS: dict[str, dict[str, Any]] = {
    "glm-5": {"model_type": "glm_moe_dsa"},
    "glm-5.2": {"model_type": "glm_moe_dsa", "num_hidden_layers": 5, "index_topk_freq": 2},
    "glm-4.5": {"model_type": "glm4_moe", "routed_scaling_factor": 2.5},
    "glm-4.5-air": {"model_type": "glm4_moe", "use_qk_norm": False},
    "glm-4.7-flash": {"model_type": "glm4_moe_lite"},
    "no query latent": {"model_type": "glm4_moe_lite", "q_lora_rank": None},
    "biases": {"model_type": "glm_moe_dsa", "attention_bias": True},
    "no biases, tied": {"model_type": "glm4_moe", "attention_bias": False, "tie_word_embeddings": True},
    "no MTP layer": {"model_type": "glm_moe_dsa", "num_nextn_predict_layers": 0},
    "two MTP layers": {"model_type": "glm4_moe", "num_nextn_predict_layers": 2},
    "groups, no shared expert": {
        "model_type": "glm4_moe_lite", "n_group": 2, "topk_group": 1, "n_shared_experts": 0,
        "norm_topk_prob": False,
    },
    "no dense layer": {"model_type": "glm4_moe", "first_k_dense_replace": 0, "n_shared_experts": 2},
}  # fmt: skip


def described(config: ModelConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in NOT_STORED}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_weight_and_the_logits_come_back(name: str, tmp_path: Path) -> None:
    model = lively_model(tiny_config(**VARIANTS[name]))
    path = write_model(tmp_path / "a.gguf", model)

    found = GgufModel(path)

    assert described(found.config) == described(model.config)
    wanted = hf_tensors(model)
    assert found.names == list(wanted)
    for label, values in wanted.items():
        assert found.shape(label) == tuple(values.shape)
        assert torch.equal(found.read(label), values), label
    assert sum(map(found.num_bytes, found.names)) == sum(v.numel() * 4 for v in wanted.values())
    ids = random_ids(2, 24)
    with torch.no_grad():
        assert torch.equal(load(found)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q4_0"])
def test_quantized_weights_are_the_reference_s(model_type: str, kind: str, tmp_path: Path) -> None:
    model = lively_model(tiny_config(model_type))
    path = write_model(tmp_path / "a.gguf", model, kind)
    found = GgufModel(path)
    stored = {
        t.name: torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type)))
        for t in gguf.GGUFReader(path).tensors
    }
    up = found.read("model.layers.1.mlp.experts.3.up_proj.weight")
    assert torch.equal(up, stored["blk.1.ffn_up_exps.weight"][3])
    joined = found.read("model.layers.2.self_attn.q_proj.weight" if model_type == "glm4_moe" else KV_B)
    if model_type == "glm4_moe":
        assert torch.equal(joined, stored["blk.2.attn_q.weight"])
    else:
        keys = stored["blk.2.attn_k_b.weight"].transpose(1, 2)
        assert torch.equal(joined.view(4, 36, 32), torch.cat((keys, stored["blk.2.attn_v_b.weight"]), dim=1))
    for name, wanted in hf_tensors(model).items():
        error = (found.read(name) - wanted).norm() / wanted.norm()
        assert error < {"BF16": 0.004, "Q8_0": 0.01, "Q4_0": 0.15}[kind], name


KV_B = "model.layers.2.self_attn.kv_b_proj.weight"


def test_an_expert_costs_its_own_bytes(tmp_path: Path) -> None:
    found = GgufModel(write_model(tmp_path / "a.gguf", lively_model(tiny_config()), "Q8_0"))
    name = "model.layers.1.mlp.experts.7.gate_proj.weight"
    assert found.source(name) == ("blk.1.ffn_gate_exps.weight", 7, None, None)
    assert found.num_bytes(name) == 40 * 64 // 32 * 34


def test_a_split_model(tmp_path: Path) -> None:
    model = lively_model(tiny_config())
    write_model(tmp_path / "m.gguf", model, split_max_tensors=20)
    found = GgufModel(sorted(tmp_path.glob("*.gguf"))[0])
    for label, values in hf_tensors(model).items():
        assert torch.equal(found.read(label), values), label


def test_fused_query_key_value(tmp_path: Path) -> None:
    model = lively_model(tiny_config("glm4_moe"))
    found = GgufModel(write_model(tmp_path / "a.gguf", model, fuse_qkv=True))
    assert found.config.attention_bias
    for label, values in hf_tensors(model).items():
        assert torch.equal(found.read(label), values), label


def test_fused_gate_and_up(tmp_path: Path) -> None:
    model = lively_model(tiny_config("glm4_moe_lite"))
    stored = converted(model)
    changes: dict[str, Any] = {}
    for name in [name for name in stored if "ffn_gate_exps" in name]:
        up = name.replace("gate", "up")
        changes |= {name: None, up: None}
        changes[name.replace("gate", "gate_up")] = torch.cat((stored[name], stored[up]), dim=1)
    found = GgufModel(write_model(tmp_path / "a.gguf", model, tensors=changes))
    for label, values in hf_tensors(model).items():
        assert torch.equal(found.read(label), values), label


def test_files_without_the_mtp_layer_s_tensors(tmp_path: Path) -> None:
    """The key still counts the layer, as in files made for llama.cpp with the layer left out."""
    model = lively_model(tiny_config("glm4_moe"))
    gone = dict.fromkeys(name for name in converted(model) if name.startswith("blk.3."))
    found = GgufModel(write_model(tmp_path / "a.gguf", model, tensors=gone))
    assert found.config.num_nextn_predict_layers == 0 and found.config.num_hidden_layers == 3
    assert not any(name.startswith("model.layers.3.") for name in found.names)
    trunk = dict.fromkeys(name for name in converted(model) if re.match(r"blk\.[012]\.", name))
    path = write_model(tmp_path / "b.gguf", model, tensors=trunk)
    with refused(CheckpointError, path, "holds only the MTP layers"):
        GgufModel(path)


def test_what_the_mtp_layer_borrows(tmp_path: Path) -> None:
    model = lively_model(tiny_config("glm4_moe"))
    embedding, head = model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach()
    changes = {
        "blk.3.nextn.embed_tokens.weight": embedding,
        "blk.3.nextn.shared_head_head.weight": head,
        "blk.3.nextn.shared_head_norm.weight": None,
        "rope_freqs.weight": torch.ones(6),
    }
    found = GgufModel(write_model(tmp_path / "a.gguf", model, tensors=changes))
    assert torch.equal(found.read("model.layers.3.shared_head.norm.weight"), model.model.norm.weight.detach())


# --- configurations ---------------------------------------------------------------------------------


def file_of(config: ModelConfig, path: Path, **changes: Any) -> GgufFile:
    """A file's metadata with the tensors' shapes only, so that a published size fits in a test."""
    path.write_bytes(raw_file())
    file = GgufFile(path)
    names = {ours: theirs for theirs, ours in ARCHITECTURES.items()}
    architecture = names[config.model_type]
    file.metadata = {"general.architecture": architecture, "tokenizer.ggml.eos_token_id": 1}
    for key, value in (keys_of(config) | changes).items():
        if isinstance(value, float):
            value = float(np.float32(value))  # as a file has it
        file.metadata[f"{architecture}.{key}"] = value
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config.vocab_size, config.hidden_size),
        "blk.0.attn_norm.weight": (1,),
        "output.weight": (1,),
        f"blk.{config.num_hidden_layers}.nextn.eh_proj.weight": (1,),
    }
    if config.attention_bias:
        shapes["blk.0.attn_q.bias"] = (1,)
    if config.use_qk_norm:
        shapes["blk.0.attn_q_norm.weight"] = (1,)
    file.tensors = {name: GgufTensor(name, shape, TYPES[0], path, 0, 0) for name, shape in shapes.items()}
    return file


@pytest.mark.parametrize("name", PRESETS)
def test_published_configurations_survive(name: str, tmp_path: Path) -> None:
    wanted = ModelConfig.preset(name)
    file = file_of(wanted, tmp_path / "a.gguf")
    for key, token in zip(("eos", "eot", "eom"), wanted.eos_token_ids, strict=True):
        file.metadata[f"tokenizer.ggml.{key}_token_id"] = token
    file.metadata["tokenizer.ggml.padding_token_id"] = wanted.pad_token_id  # type: ignore[assignment]
    assert described(model_config(file)) == described(wanted)


def test_glm_5_2_without_the_key_for_its_indexers(tmp_path: Path) -> None:
    config = ModelConfig.preset("glm-5.2")
    file = file_of(config, tmp_path / "a.gguf")
    del file.metadata["glm-dsa.attention.indexer.types"]
    assert model_config(file).indexer_types == config.indexer_types


OPTIONAL = {
    "nextn_predict_layers", "leading_dense_block_count", "expert_group_count", "expert_group_used_count",
    "expert_weights_norm", "expert_weights_scale", "expert_gating_func", "attention.indexer.types",
}  # fmt: skip


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_missing_key_is_named(model_type: str, tmp_path: Path) -> None:
    config = tiny_config(model_type, num_nextn_predict_layers=0)
    ignored = {"attention.value_length"}
    # In MLA these describe the absorbed form.
    ignored |= {"attention.key_length", "attention.head_count_kv"} if config.uses_mla else set()
    ignored |= {"attention.q_lora_rank"} if model_type == "glm4_moe_lite" else set()
    for key in keys_of(config):
        file = file_of(config, tmp_path / "a.gguf")
        full = f"{file.architecture}.{key}"
        del file.metadata[full]
        if key in OPTIONAL | ignored and not (key == "expert_gating_func" and model_type == "glm4_moe_lite"):
            model_config(file)
            continue
        with refused(CheckpointError, file.path, full):
            model_config(file)


SIZES = ("block_count", "attention.head_count", "expert_count", "embedding_length", "rope.dimension_count",
         "attention.q_lora_rank", "attention.kv_lora_rank", "attention.indexer.head_count")  # fmt: skip


@pytest.mark.parametrize("value", ["many", -1, 0, 2.5, True, [1, 2], [], 1 << 63])
def test_an_impossible_key_is_named(value: Any, tmp_path: Path) -> None:
    for key in SIZES:
        file = file_of(tiny_config(), tmp_path / "a.gguf", **{key: value})
        with refused(CheckpointError, file.path):
            GgufModel(file)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_gating_func", 1),
        ("rope.scaling.type", "yarn"),
        ("attention.temperature_scale", 0.1),
        ("attention.causal", False),
        ("attention.indexer.types", [True]),
        ("attention.indexer.types", [2, 1, 1]),
        ("attention.indexer.types", [False, True, True]),
    ],
)
def test_another_network_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    file = file_of(tiny_config(), tmp_path / "a.gguf", **{key: value})
    with refused(
        CheckpointError, file.path, key.rpartition(".")[2] if value != [False, True, True] else "indexer"
    ):
        model_config(file)


def test_deepseek_v2_is_not_glm_4_7_flash(tmp_path: Path) -> None:
    """Its files have no key for the gate: llama.cpp takes softmax, but for GLM-4.7-Flash."""
    file = file_of(tiny_config("glm4_moe_lite"), tmp_path / "a.gguf")
    del file.metadata["deepseek2.expert_gating_func"]
    with refused(CheckpointError, "deepseek2.expert_gating_func", "sigmoid"):
        model_config(file)
    flash = file_of(ModelConfig.preset("glm-4.7-flash"), tmp_path / "a.gguf")
    del flash.metadata["deepseek2.expert_gating_func"]
    model_config(flash)


def test_other_architectures_are_only_files(tmp_path: Path) -> None:
    path = write_model(tmp_path / "a.gguf", lively_model(tiny_config("glm4_moe")), architecture="llama")
    assert "blk.0.attn_q.weight" in GgufFile(path).tensors
    with refused(CheckpointError, path, "'llama'", "not a GLM", "glm-dsa, glm4moe, deepseek2"):
        GgufModel(path)
    path.write_bytes(raw_file())
    with refused(CheckpointError, path, "general.architecture"):
        GgufModel(path)


# --- tensors that do not fit ------------------------------------------------------------------------

GATE = "blk.1.ffn_gate_exps.weight"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({GATE: None}, [GATE, "missing", "model.layers.1.mlp.experts.0.gate_proj.weight"]),
        ({GATE: torch.zeros(8, 41, 64)}, [GATE, "[8, 41, 64]", "[8, 40, 64]"]),
        ({GATE: torch.zeros(7, 40, 64)}, [GATE, "[7, 40, 64]", "[8, 40, 64]"]),
        ({"blk.2.attn_k_b.weight": None}, ["attn_k_b.weight", "missing", KV_B]),
        ({"blk.2.attn_v_b.weight": torch.zeros(4, 20, 31)}, ["attn_v_b.weight", "[4, 20, 31]"]),
        ({"blk.1.exp_probs_b.bias": None}, ["blk.1.exp_probs_b.bias", "missing"]),
        ({"blk.3.nextn.hnorm.weight": None}, ["blk.3.nextn.hnorm.weight", "missing"]),
        ({"blk.1.ffn_gate_exps.scale": torch.ones(8)}, ["blk.1.ffn_gate_exps.scale", "no place"]),
        ({"a": torch.ones(1), "b": torch.ones(1)}, ["a and 1 more", "no place"]),
        ({"token_embd.weight": torch.ones(3)}, ["token_embd.weight", "[3]"]),
        ({"token_embd.weight": None}, ["no tensor token_embd.weight"]),
    ],
)
def test_tensors_that_do_not_fit_are_named(changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    path = write_model(tmp_path / "a.gguf", lively_model(tiny_config()), tensors=changes)
    with refused(CheckpointError, path, *words):
        GgufModel(path)


def test_a_shared_layer_may_carry_an_indexer(tmp_path: Path) -> None:
    model = lively_model(tiny_config(num_hidden_layers=5, index_topk_freq=2))
    shared = next(i for i in range(5) if not model.config.has_indexer(i))
    extra = {f"blk.{shared}.indexer.proj.weight": torch.zeros(3, 64)}
    GgufModel(write_model(tmp_path / "a.gguf", model, tensors=extra))


def test_a_type_without_decoder_is_refused_at_once(tmp_path: Path) -> None:
    file = GgufFile(write_model(tmp_path / "a.gguf", lively_model(tiny_config())))
    old = file.tensors[GATE]
    file.tensors[GATE] = GgufTensor(GATE, old.shape, TYPES[15], old.path, old.start, old.end)
    with refused(CheckpointError, file.path, GATE, "IQ2_XXS"):
        GgufModel(file)


def test_an_unknown_name(tmp_path: Path) -> None:
    found = GgufModel(write_model(tmp_path / "a.gguf", lively_model(tiny_config())))
    for ask in (found.read, found.shape, found.num_bytes):
        with refused(CheckpointError, found.file.path, "no tensor model.absent"):
            ask("model.absent")
