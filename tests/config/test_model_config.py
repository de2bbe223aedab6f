"""Configs in and out, what is refused, the presets, and their parameter counts."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5.config import ModelConfig
from glm5.disk.json_file import MAX_BYTES
from glm5.errors import ConfigError
from glm5.model.transformer import GlmForCausalLM
from tests.model_fixture import tiny_config, tiny_configs

quick = settings(max_examples=60, deadline=None)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def known_values(config: ModelConfig) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name != "extra"}


def parameters(config: ModelConfig) -> tuple[int, int]:
    """(without MTP, with MTP) of the real modules, built without memory."""
    with torch.device("meta"):
        model = GlmForCausalLM(config)
    total = sum(p.numel() for p in model.parameters())
    return total - sum(p.numel() for p in model.mtp.parameters()), total


# --- in and out ------------------------------------------------------------------------------


@quick
@given(tiny_configs())
def test_a_config_survives_writing_and_reading(config: ModelConfig) -> None:
    written = json.loads(json.dumps(config.to_dict()))
    again = ModelConfig.from_dict(written)
    # first_k_dense_replace is made to agree with mlp_layer_types when written.
    assert known_values(again) == known_values(config) | {"first_k_dense_replace": config.num_dense_layers}
    assert again.to_dict() == config.to_dict()


@quick
@given(st.dictionaries(st.text(max_size=8).map(lambda key: f"x_{key}"), json_values, max_size=4))
def test_unknown_keys_are_kept_and_written_back(unknown: dict[str, Any]) -> None:
    config = tiny_config(**unknown)
    assert unknown.items() <= config.extra.items()
    assert unknown.items() <= ModelConfig.from_dict(config.to_dict()).to_dict().items()


def test_a_model_without_an_indexer_stays_one() -> None:
    config = tiny_config(index_topk=None)
    assert not config.uses_dsa
    assert not ModelConfig.from_dict(config.to_dict()).uses_dsa


def test_a_saved_directory_loads(tmp_path: Path) -> None:
    config = ModelConfig.preset("GLM-5.2")
    config.save_pretrained(tmp_path)
    for place in (tmp_path, tmp_path / "config.json", str(tmp_path)):
        assert known_values(ModelConfig.from_pretrained(place)) == known_values(config)


@pytest.mark.parametrize("alias", ["num_experts", "num_local_experts", "num_mtp_layers"])
def test_aliases_are_read_and_the_real_name_counts_more(alias: str) -> None:
    name = "num_nextn_predict_layers" if alias == "num_mtp_layers" else "n_routed_experts"
    raw = tiny_config().to_dict()
    real, value = raw.pop(name), 16
    alone = ModelConfig.from_dict(raw | {alias: value})
    assert getattr(alone, name) == value
    assert alias not in alone.to_dict()
    for both in ({alias: value, name: real}, {name: real, alias: value}):
        assert getattr(ModelConfig.from_dict(raw | both), name) == real


def test_theta_is_read_from_rope_parameters_then_from_the_top() -> None:
    rope = {"rope_type": "default", "rope_theta": 8e6}
    assert tiny_config(rope_theta=5.0, rope_parameters=rope).rope_theta == 8e6
    assert tiny_config(rope_theta=5, rope_parameters=None).rope_theta == 5.0
    assert tiny_config(rope_parameters=None).rope_theta == 1e6
    assert tiny_config(rope_parameters=None, rope_scaling=rope).rope_theta == 8e6
    assert tiny_config("glm4_moe", rope_parameters=rope).rotary_dim == 12  # half of 24


def test_head_dim_of_mla_releases_is_kept_but_not_used() -> None:
    for value in (64, 192):
        config = tiny_config(head_dim=value)
        assert config.attention_head_dim == 24
        assert config.to_dict()["head_dim"] == value


def test_other_readers_find_the_keys_they_need() -> None:
    written = tiny_config(mlp_layer_types=["dense", "dense", "sparse"]).to_dict()
    wanted = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
    assert (wanted | {"first_k_dense_replace": 2, "rope_theta": 1e4}).items() <= written.items()
    assert written["architectures"] == ["GlmMoeDsaForCausalLM"]


# --- the indexer schedule --------------------------------------------------------------------


def test_index_share_of_glm_5_2_and_every_layer_of_glm_5() -> None:
    shared = ModelConfig.preset("glm-5.2")
    full = [layer for layer in range(78) if shared.has_indexer(layer)]
    assert full == [0, 1, *range(2, 78, 4)]
    assert len(full) == 21
    assert shared.has_indexer(78)  # the MTP layer
    assert all(ModelConfig.preset("glm-5").has_indexer(layer) for layer in range(79))
    assert not any(ModelConfig.preset("glm-4.7-flash").has_indexer(layer) for layer in range(48))


def test_indexer_types_count_more_than_the_pattern_and_the_pattern_more_than_freq() -> None:
    freq = {"index_topk_freq": 2, "index_skip_topk_offset": 1}
    by_freq = tiny_config(num_hidden_layers=4, **freq)
    assert by_freq.indexer_types == ("full", "shared", "full", "shared")
    for pattern in ("FFSS", ["F", "F", "S", "S"], ["full", "full", "shared", "shared"]):
        by_pattern = tiny_config(num_hidden_layers=4, index_topk_pattern=pattern, **freq)
        assert by_pattern.indexer_types == ("full", "full", "shared", "shared")
    types = ["full", "shared", "shared", "full"]
    everything = tiny_config(num_hidden_layers=4, indexer_types=types, index_topk_pattern="FFSS", **freq)
    assert everything.indexer_types == tuple(types)
    nulls = tiny_config(indexer_types=None, index_topk_pattern=None, index_topk_freq=None)
    assert nulls.indexer_types == ("full",) * 3


# --- presets and counts ----------------------------------------------------------------------


def test_counts_of_the_large_models_to_the_unit() -> None:
    for name, total, with_mtp, active in (
        ("glm-5", 743_911_199_232, 753_864_119_552, 40_831_942_656),
        ("glm-5.2", 743_377_000_704, 753_329_921_024, 40_297_758_720),
    ):
        config = ModelConfig.preset(name)
        assert (config.total_params(), config.total_params(mtp=True)) == (total, with_mtp)
        assert config.active_params() == active


def test_counts_of_the_lineage_in_billions() -> None:
    published = {"glm-4.5-air": (106.9, 12.8), "glm-4.5": (352.8, 32.9), "glm-4.7-flash": (29.9, 3.6)}
    for name, (total, active) in published.items():
        config = ModelConfig.preset(name)
        assert round(config.total_params() / 1e9, 1) == total
        assert round(config.active_params() / 1e9, 1) == active


@pytest.mark.parametrize("name", ["glm-5", "glm-5.2", "glm-4.5", "glm-4.5-air", "glm-4.7-flash"])
def test_counts_are_those_of_the_modules(name: str) -> None:
    config = ModelConfig.preset(name)
    assert parameters(config) == (config.total_params(), config.total_params(mtp=True))


@quick
@given(tiny_configs())
def test_counts_are_those_of_any_modules(config: ModelConfig) -> None:
    assert parameters(config) == (config.total_params(), config.total_params(mtp=True))


# --- what is refused -------------------------------------------------------------------------

NOT_A_SIZE = (0, -1, None, 1.5, True, "64", [64])
BAD_VALUES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "num_attention_heads", "v_head_dim"), NOT_A_SIZE),
    **dict.fromkeys(("moe_intermediate_size", "intermediate_size", "index_n_heads"), NOT_A_SIZE),
    "model_type": (None, "llama", 3, ["glm4_moe"]),
    "num_hidden_layers": (*NOT_A_SIZE, 10**15),
    "n_routed_experts": (*NOT_A_SIZE, 1),
    "num_experts_per_tok": (*NOT_A_SIZE, 9),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), (0, -1, None, 1.5, "64")),
    "qk_nope_head_dim": (-8, None, 1.5),
    "qk_rope_head_dim": (0, -8, None),
    "index_topk": (0, -1, 1.5, "8"),
    "index_head_dim": (*NOT_A_SIZE, 6),
    **dict.fromkeys(("index_topk_freq", "index_skip_topk_offset"), ("often", [1])),
    "index_topk_pattern": ("FXF", 7, "FF", "SFF", [["F"]]),
    "indexer_types": (["full"], ["full", "full", "some"], ["shared"] * 3, "full", [[], [], []]),
    "mlp_layer_types": (["dense"], ["dense", "wet", "sparse"], [["dense"]] * 3, 3),
    "n_group": (0, 3, 8),
    "topk_group": (0, 2),
    "n_shared_experts": (-1, None, "1"),
    "num_nextn_predict_layers": (-1, None, 0.5),
    "first_k_dense_replace": (-1, None),
    "rms_norm_eps": (0, -1e-5, float("nan"), float("inf"), None, "small"),
    "rope_theta": (0, -1, float("nan"), 10**400, "1e6"),
    "rope_type": ("yarn", 3),
    "rope_parameters": ("default", 7, [1]),
    "hidden_act": ("gelu", None),
    "scoring_func": ("softmax",),
    "partial_rotary_factor": (-0.5, 3.0, float("nan"), float("inf"), "half"),
    "num_key_value_heads": (*NOT_A_SIZE, 3),
    "head_dim": (-24, 1.5, "24"),
    "attention_mask_type": ("full", None, 1),
    "eos_token_id": ("2", 1.5, ["2"], {}),
    "tie_word_embeddings": (None, 1, "true"),
}


@pytest.mark.parametrize(
    ("key", "value"),
    [pytest.param(k, v, id=f"{k}={v!r:.20}") for k, values in BAD_VALUES.items() for v in values],
)
def test_impossible_values_are_refused_by_name(key: str, value: Any) -> None:
    grouped = key in ("partial_rotary_factor", "head_dim", "num_key_value_heads", "num_hidden_layers")
    raw = tiny_config("glm4_moe" if grouped else "glm_moe_dsa").to_dict()
    if key.startswith("index_"):
        raw.pop("indexer_types")
    if key in ("first_k_dense_replace", "intermediate_size"):
        raw.pop("mlp_layer_types")
    derived = {"partial_rotary_factor": "|rotary width", "index_topk_pattern": "|indexer_types"}
    names = key + derived.get(key, "")
    if key in ("rope_theta", "rope_type", "partial_rotary_factor"):
        key, value = "rope_parameters", raw["rope_parameters"] | {key: value}
    with pytest.raises(ConfigError, match=names) as caught:
        ModelConfig.from_dict(raw | {key: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{}, {"index_topk": None}], ids=["lite", "dsa"])
@pytest.mark.parametrize("rank", [0, -1])
def test_a_query_rank_that_may_be_left_out_is_still_a_size(changes: dict[str, Any], rank: int) -> None:
    model_type = "glm_moe_dsa" if changes else "glm4_moe_lite"
    assert tiny_config(model_type, q_lora_rank=None, **changes).q_lora_rank is None
    with pytest.raises(ConfigError, match=rf"^q_lora_rank is {rank}; it must be a positive integer or null$"):
        tiny_config(model_type, q_lora_rank=rank, **changes)


def test_heads_without_width_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^hidden_size 4 leaves no width for num_attention_heads 8;.+head_dim"
    ):
        tiny_config("glm4_moe", head_dim=None, hidden_size=4, num_attention_heads=8)
    with pytest.raises(ConfigError, match=r"^the rotary width is 0; it must be positive and even"):
        tiny_config("glm4_moe", rope_parameters=None, partial_rotary_factor=0.01)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        *((text, "not valid JSON") for text in (b"", b'{"a": 1', b"\xff\xfe{}", b"[" * 200_000)),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (None, "no such file"),
        (b"[]", "JSON list, expected an object"),
        (b"{}", "no model_type"),
        (b'{"model_type": "glm4_moe", "hidden_size": -4}', "hidden_size"),
        (b" " * (MAX_BYTES + 1), "more than the 8 MiB"),
    ],
    ids=range(10),
)
def test_damaged_files_are_named_in_one_line(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_pretrained(tmp_path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"), [("n_routed_experts", 4_000_000_000), ("hidden_size", 10**30), ("vocab_size", 2**40)]
)
def test_sizes_that_no_model_has_are_refused_by_name(key: str, value: int) -> None:
    shown = value if value < 2**64 else r"past 2\^64"
    with pytest.raises(ConfigError, match=rf"^{key} is {shown}; no model has more than"):
        tiny_config("glm_moe_dsa", **{key: value})
