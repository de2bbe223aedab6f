"""The count of memory against what a loaded model and its cache really hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from glm5.checkpoint import Checkpoint, save_model
from glm5.config import MODEL_TYPES, ModelConfig
from glm5.layers.loading import load_model
from glm5.model.transformer import GlmForCausalLM
from glm5.planner.bytes import cache_bytes_per_token, weight_bytes
from glm5.quantize import Recipe, quantize
from glm5.runtime.cache import PagePool
from tests.model_fixture import tiny_config, tiny_configs, tiny_model
from tests.quantize.quantize_fixture import no_flushing as no_flushing
from tests.quantize.quantize_fixture import small_config

SCHEME = Recipe(4, 32).scheme_of


def held(model: GlmForCausalLM) -> int:
    """Bytes of every parameter and buffer, shared ones once."""
    seen = {t.data_ptr(): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}
    return sum(seen.values())


@pytest.mark.parametrize("stored", ["fp32", "fp16", "bf16", "fp8"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_floats_are_counted(tmp_path: Path, model_type: str, dtype: torch.dtype | None, stored: str) -> None:
    save_model(tiny_model(tiny_config(model_type)), tmp_path, stored=stored)
    assert weight_bytes(Checkpoint(tmp_path), dtype).total == held(load_model(tmp_path, dtype=dtype))


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"n_shared_experts": 0}], ids=str)
@pytest.mark.parametrize("rules", [[], ["lm_head=8", "*.o_proj=keep"], ["*.embed_tokens=8"]], ids=str)
def test_integers_are_counted_as_they_lie(tmp_path: Path, options: dict[str, Any], rules: list[str]) -> None:
    source, recipe = tmp_path / "source", Recipe.of(4, 32, rules, [])
    if options.get("tie_word_embeddings") and "lm_head=8" in rules:
        rules.remove("lm_head=8")
        recipe = Recipe.of(4, 32, rules, [])
    save_model(tiny_model(small_config(**options)), source, stored="bf16")
    quantize(source, tmp_path / "int4", recipe)
    checkpoint = Checkpoint(tmp_path / "int4")
    assert weight_bytes(checkpoint).total == held(load_model(checkpoint))
    counted = weight_bytes(Checkpoint(source), torch.float32, recipe.scheme_of)
    loaded = load_model(source, dtype=torch.float32, quantize=recipe.scheme_of)
    assert counted.total == held(loaded)
    assert 0 < counted.experts < counted.total


@settings(max_examples=30, deadline=None)
@given(tiny_configs())
def test_a_cache_takes_what_is_said(config: ModelConfig) -> None:
    layers = config.num_hidden_layers
    for some in (range(layers), range(layers, layers + config.num_nextn_predict_layers)):
        pool = PagePool(config, 3, dtype=torch.bfloat16, layers=some, page_tokens=8)
        assert pool.page_bytes == 8 * cache_bytes_per_token(config, torch.bfloat16, some)
