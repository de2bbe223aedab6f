"""Which module gets how many bits: the last pattern that fits, and what is small stays as it is."""

from __future__ import annotations

import pytest
import torch

from glm5.checkpoint import names
from glm5.config import MODEL_TYPES
from glm5.errors import RecipeError
from glm5.formats.packed import Scheme
from glm5.model.transformer import GlmForCausalLM
from glm5.quantize import Recipe, widest_group
from tests.checkpoint.checkpoint_fixture import refused
from tests.quantize.quantize_fixture import small_config

EXPERT = "model.layers.3.mlp.experts.7.gate_proj"


def bits_of(recipe: Recipe, module: str) -> int:
    scheme = recipe.scheme_of(module)
    return 0 if scheme is None else scheme.bits


def test_every_other_linear_layer_has_the_default_scheme() -> None:
    recipe = Recipe()
    for module in (EXPERT, "model.layers.0.self_attn.q_a_proj", "model.layers.0.self_attn.o_proj",
                   "model.layers.0.mlp.down_proj", "model.layers.3.mlp.shared_experts.up_proj",
                   "model.layers.3.self_attn.kv_b_proj",
                   "model.layers.3.self_attn.indexer.wq_b"):  # fmt: skip
        assert recipe.scheme_of(module) == Scheme(4, 64, torch.bfloat16)
    for kept in ("lm_head", "model.embed_tokens", "model.layers.3.mlp.gate", "model.layers.3.eh_proj"):
        assert recipe.scheme_of(kept) is None


def test_no_rule_reaches_the_keys_of_the_indexer() -> None:
    recipe = Recipe.of(8, 64, ["*=8", "*.indexer.*=4"], [])
    assert bits_of(recipe, "model.layers.3.self_attn.indexer.wq_b") == 4
    for module in ("model.layers.3.self_attn.indexer.wk", "model.layers.3.self_attn.indexer.weights_proj"):
        assert bits_of(recipe, module) == 0


def test_the_last_pattern_that_fits_counts() -> None:
    rules = ["*.mlp.*=8", "model.layers.3.*=4", "*.experts.7.*=keep", "*.gate_proj=8", "lm_head=8"]
    recipe = Recipe.of(4, 64, rules, [])
    assert bits_of(recipe, EXPERT) == 8
    assert bits_of(recipe, EXPERT.replace("gate_proj", "up_proj")) == 0
    assert bits_of(recipe, "model.layers.3.mlp.down_proj") == 4
    assert bits_of(recipe, "model.layers.4.mlp.down_proj") == 8
    assert bits_of(recipe, "lm_head") == 8
    kept = Recipe.of(8, 32, ["*=4"], ["*.o_proj", "*.layers.?.mlp.*"])
    assert bits_of(kept, "model.layers.9.self_attn.o_proj") == 0
    assert bits_of(kept, "model.layers.9.mlp.up_proj") == 0
    assert bits_of(kept, "model.layers.10.mlp.up_proj") == 4


def test_a_rule_may_have_a_group_of_its_own() -> None:
    recipe = Recipe.of(4, 64, ["*.self_attn.*=8:32", "*.o_proj=4", "lm_head=8:256", "*.q_b_proj=keep"], [])
    attention = "model.layers.3.self_attn"
    assert recipe.scheme_of(f"{attention}.kv_b_proj") == Scheme(8, 32)
    assert recipe.scheme_of(f"{attention}.o_proj") == Scheme(4, 64)
    assert recipe.scheme_of("lm_head") == Scheme(8, 256)
    assert recipe.scheme_of(f"{attention}.q_b_proj") is None


def test_only_a_pattern_that_spells_it_means_the_embedding() -> None:
    for pattern, bits in (
        ("*", 0),
        ("model.*", 0),
        ("*.embed*", 0),
        ("*.embed_tokens", 8),
        ("*embed_tokens*", 8),
    ):
        assert bits_of(Recipe.of(4, 64, [f"{pattern}=8"], []), "model.embed_tokens") == bits


def test_a_pattern_is_no_regular_expression() -> None:
    recipe = Recipe.of(4, 64, ["model.layers.1.*=8", "a[=8", "(=8", "x=y=8", "[01].*=8"], [])
    assert bits_of(recipe, "model.layers.11.mlp.up_proj") == 4
    assert bits_of(recipe, "modelXlayers.1.mlp.up_proj") == 4
    assert [bits_of(recipe, name) for name in ("a[", "(", "x=y", "1.w", "2.w", "a")] == [8, 8, 8, 8, 4, 4]


@pytest.mark.parametrize(
    "change",
    [
        "",
        "=",
        "=4",
        "*.mlp.*",
        "*=5",
        "*=0",
        "*= 4",
        "*=KEEP",
        "*=4.0",
        "*=-4",
        "*=8:",
        "*=8:x",
        "*=8:-32",
        "*=keep:32",
    ],
)
def test_a_change_that_cannot_be_read_is_named(change: str) -> None:
    with refused(RecipeError, repr(change), "PATTERN=4"):
        Recipe.of(4, 64, ["*=8", change], [])


@pytest.mark.parametrize(
    ("bits", "group", "word"),
    [(3, 64, "3 bits"), (0, 64, "0 bits"), (16, 64, "16 bits"), (-4, 64, "-4 bits"), (4, 0, "group 0"),
     (4, -32, "group -32"), (4, 48, "group 48"), (4, 16, "group 16")],
)  # fmt: skip
def test_bits_and_groups_that_no_kernel_has_are_refused(bits: int, group: int, word: str) -> None:
    with refused(RecipeError, word):
        Recipe.of(bits, group, [], [])


def test_a_rule_of_impossible_bits_or_groups_is_refused() -> None:
    with refused(RecipeError, "5 bits"):
        Recipe(rules=(("*", 5),))
    with refused(RecipeError, "group 48"):
        Recipe(rules=(("*", 8, 48),))


def test_a_scheme_says_what_a_weight_costs() -> None:
    assert 8 * Scheme(4, 64).num_bytes(3, 128) / (3 * 128) == 4.25
    assert 8 * Scheme(8, 32, torch.float32).num_bytes(2, 64) / (2 * 64) == 9.0


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("width", [64, 96, 128])
def test_the_widest_group_divides_every_layer_that_is_rounded(model_type: str, width: int) -> None:
    changes = {"moe_intermediate_size": width, "hidden_size": 128, "intermediate_size": 256}
    if model_type != "glm4_moe":
        changes |= {"q_lora_rank": 64, "kv_lora_rank": 64, "v_head_dim": 32}
    else:
        changes |= {"head_dim": 32}
    config = small_config(model_type, **changes)
    group = widest_group(config)
    assert group == (32 if width == 96 else 64)
    with torch.device("meta"):
        model = GlmForCausalLM(config)
    tensors = names.state_tensors(model)
    for piece in names.pieces(model):
        shape = piece.of(tensors[piece.parameter]).shape
        if len(shape) == 2 and Recipe().scheme_of(piece.name.removesuffix(".weight")):
            assert shape[1] % group == 0, piece.name
