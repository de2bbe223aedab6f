"""Muon makes updates orthogonal, head by head and expert by expert; the schedule is as written."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5.training.optimizers import (
    UPDATE_RMS,
    build_optimizers,
    learning_rate,
    matrix_blocks,
    orthogonalise,
)
from glm5.training.recipe import OptimizerSection
from tests.model_fixture import tiny_config, tiny_model


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(2, 40), st.integers(2, 40), st.integers(0, 2**31))
def test_singular_values_come_near_one(count: int, rows: int, columns: int, seed: int) -> None:
    matrices = torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(seed))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    large = torch.linalg.svdvals(matrices) > 0.1 * torch.linalg.matrix_norm(matrices, 2)[:, None]
    assert float(values.max()) < 1.35
    assert float(values[large].min()) > 0.5


def test_blocks_cover_each_parameter_once() -> None:
    model = tiny_model(tiny_config())
    blocks = matrix_blocks(model)
    assert blocks
    for parameter, split in blocks.items():
        parts = split(parameter)
        assert sum(part.numel() for part in parts) == parameter.numel()
        assert all(part.data_ptr() >= parameter.data_ptr() for part in parts)
        assert all(part._is_view() for part in parts)


def test_every_parameter_has_one_optimizer() -> None:
    model = tiny_model(tiny_config())
    for kind in ("muon", "adamw"):
        optimizers = build_optimizers(model, OptimizerSection(kind=kind))
        owned = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        assert len(owned) == len(set(owned)) == len(list(model.parameters()))


def test_muon_step_has_the_size_of_an_adam_step() -> None:
    model = tiny_model(tiny_config())
    muon = build_optimizers(model, OptimizerSection(lr=1e-2, weight_decay=0.0))[0]
    experts = model.moe_layers()[0].experts
    before = experts.gate_up_proj.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    muon.step()
    change = experts.gate_up_proj.detach() - before
    width = experts.down_proj.shape[2]
    for part in (change[:, :width], change[:, width:]):
        rms = part.pow(2).mean(dim=(1, 2)).sqrt()
        assert (rms / 1e-2 / UPDATE_RMS).allclose(torch.ones(1), rtol=0.3)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_rate_warms_up_and_decays_to_its_floor(schedule: str) -> None:
    settings_ = OptimizerSection(lr=1.0, warmup=0.1, min_lr_ratio=0.1, schedule=schedule)  # type: ignore[arg-type]
    rates = [learning_rate(settings_, step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(1.0)
    assert all(a <= b for a, b in itertools.pairwise(rates[:100]))
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1, abs=0.01)
