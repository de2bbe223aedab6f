"""Recipes: shipped ones are valid, wrong keys are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glm5.errors import RecipeError
from glm5.training.recipe import parse_change, read_recipe


@pytest.mark.parametrize("name", ["nano", "smoke"])
def test_shipped_recipes_are_valid(name: str) -> None:
    recipe = read_recipe(name)
    config = recipe.model_config_for(recipe.tokenizer.vocab_size, (1, 2), 0)
    assert config.model_type == "glm_moe_dsa"
    assert config.active_params() < config.total_params()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("run.stepz=3", "run.stepz: unknown key; did you mean steps?"),
        ("run.steps=0", "run.steps"),
        ("run.steps=many", "run.steps"),
        ("optimizer.kind=sgd", "optimizer.kind"),
        ("surprise=1", "surprise: unknown key"),
        ("data.stages=[{untill=1.0, mix={en=1}}]", "data.stages.0.untill: unknown key; did you mean until?"),
        ("data.stages=[{mix={en=nan}}]", "data.stages.0.mix.en: Input should be a finite number"),
        ("loss.bias_update=inf", "loss.bias_update: Input should be a finite number"),
        ("optimizer.lr=inf", "optimizer.lr: Input should be a finite number"),
        ("optimizer.betas=[1.5, 0.9]", "optimizer.betas.0"),
        ("seed=-1", "seed"),
        ("seed=99999999999999999999999", "seed"),
        ("run.threads=100000", "run.threads"),
        ("name='..'", "name"),
        ("data.stages=[]", "data.stages"),
        ("data.stages=[{until=0.5, mix={en=1}}]", "stages' `until` must rise and end at 1.0"),
        ("data.stages=[{mix={en=-1}}]", "weights >= 0"),
        ("run.micro_batch_rows=7", "multiple of micro_batch_rows"),
        ("name='../x'", "name"),
    ],
)
def test_wrong_keys_are_named(change: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        read_recipe("smoke", dict([parse_change(change)]))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_impossible_model_is_refused_by_key() -> None:
    recipe = read_recipe("smoke", {"model.num_experts_per_tok": 99})
    with pytest.raises(RecipeError, match="num_experts_per_tok 99"):
        recipe.model_config_for(2048, (1,), 0)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(RecipeError) as error:
        read_recipe("smoke", {"run.stepz": 3, "optimizer.lr": -1.0})
    assert "run.stepz" in str(error.value)
    assert "optimizer.lr" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.n_routed_expert": 16}, "model.n_routed_expert: unknown key; did you mean n_routed_experts?"),
        ({"data.sequence_length": 1024}, "1024 is more than model.max_position_embeddings 512"),
        ({"model.hidden_size": "abc"}, "hidden_size"),
    ],
)  # fmt: skip
def test_the_model_section_is_checked_before_any_work(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        read_recipe("smoke", change).check_model()
    assert message in str(error.value)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"missing.toml: cannot be read"):
        read_recipe(tmp_path / "missing.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ")
    with pytest.raises(RecipeError, match=r"broken.toml: not TOML"):
        read_recipe(broken)
    with pytest.raises(RecipeError, match="expected KEY=VALUE"):
        parse_change("nothing")
