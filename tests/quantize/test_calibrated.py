"""The calibrated walk: every matrix is rounded on the inputs it will have; the result is a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import glm5
from glm5.checkpoint import ShardIndex
from glm5.checkpoint.names import disk_name
from glm5.config import MODEL_TYPES
from glm5.evaluation.compare import evaluate
from glm5.layers.loading import load_model
from glm5.model.mtp import MTPLayer
from glm5.model.transformer import GlmForCausalLM
from glm5.quantize import Calibration, Recipe, layer_solver, quantize
from glm5.quantize.directory import WORKING
from glm5.quantize.gptq import Hessian
from glm5.quantize.hidden import step_of
from glm5.quantize.layer_solver import LayerSolver
from glm5.runtime.language_model import LanguageModel
from tests.model_fixture import random_ids
from tests.quantize.quantize_fixture import RECIPE, as_floats, contents, save_source, small_config, spread
from tests.quantize.quantize_fixture import no_flushing as no_flushing
from tests.quantize.quantize_fixture import no_gradients as no_gradients

pytestmark = pytest.mark.usefixtures("no_gradients")
types = pytest.mark.parametrize("model_type", MODEL_TYPES)
Inputs = dict[str, Tensor]


def windows(count: int = 6, length: int = 24, seed: int = 5) -> Calibration:
    """The last window is shorter, as the end of a text is."""
    rows = random_ids(count, length, seed=seed).tolist()
    return Calibration((*map(tuple, rows[:-1]), tuple(rows[-1][: length // 2])))


@pytest.fixture
def hessians(monkeypatch: pytest.MonkeyPatch) -> dict[str, Hessian]:
    """What each matrix was rounded on, by its name."""
    found: dict[str, Hessian] = {}
    solve_one = LayerSolver._solve_one

    def note(self: LayerSolver, item: Any, hessian: Hessian, factor: Any) -> None:
        found[item.name] = hessian
        solve_one(self, item, hessian, factor)

    monkeypatch.setattr(LayerSolver, "_solve_one", note)
    return found


# --- the inputs that are counted ----------------------------------------------------------------------


def inputs_in(model: GlmForCausalLM, calibration: Calibration) -> Inputs:
    """What every linear layer reads in the whole model, window after window: sums of x x^T."""
    plain = GlmForCausalLM(model.config)  # whole layers in one call have no linear layers to watch
    plain.load_state_dict(model.state_dict())
    model, sums = plain.eval(), {}

    def count(name: str, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).double()
        sums[name] = sums.get(name, 0) + x.T @ x

    def watch(name: str) -> Callable[..., None]:
        return lambda module, inputs: count(f"{name}.weight", inputs[0])

    def watch_experts(name: str) -> Callable[..., None]:
        def seen(bank: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
            x_TD, ids_TK, _ = inputs
            for expert in range(len(bank.down_proj)):
                token, _ = (ids_TK == expert).nonzero(as_tuple=True)
                gate, up = (x_TD[token] @ bank.gate_up_proj[expert].T).chunk(2, dim=-1)
                count(f"{name}.{expert}.gate_proj.weight", x_TD[token])
                count(f"{name}.{expert}.up_proj.weight", x_TD[token])
                count(f"{name}.{expert}.down_proj.weight", torch.nn.functional.silu(gate) * up)

        return seen

    for path, module in model.named_modules():
        name = disk_name(f"{path}.", model.config).removesuffix(".")
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(watch(name))
        elif path.endswith(".experts"):
            module.register_forward_pre_hook(watch_experts(name))
    for window in calibration.input_ids:
        ids = torch.tensor([window])
        hidden = model(ids).hidden
        for layer in model.mtp:
            assert isinstance(layer, MTPLayer)
            following = torch.cat((ids[:, 1:], ids[:, -1:]), dim=1)
            layer(hidden, model.model.embed_tokens(following), step_of(len(window), model.config))
    return sums


@types
def test_every_matrix_is_rounded_on_the_inputs_it_will_have(
    tmp_path: Path, hessians: dict[str, Hessian], monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """The inputs in the finished model, whole in memory: the layers behind, too, are those of the result."""
    monkeypatch.setattr(layer_solver, "PRIOR", 0.0)
    changes = {"index_topk_freq": 2, "index_topk": 12} if model_type == "glm_moe_dsa" else {}
    save_source(tmp_path / "source", small_config(model_type, **changes))
    recipe = Recipe.of(4, 32, ["*.layers.2.*.shared_experts.*=8"], ["*.layers.1.self_attn.[qk]*"])
    receipt = quantize(tmp_path / "source", tmp_path / "int4", recipe, calibration=windows())

    wanted = inputs_in(as_floats(tmp_path / "int4"), windows())
    assert hessians.keys() <= receipt["tensors"].keys()
    unseen = {name for name in receipt["tensors"] if name not in hessians}
    assert all(".experts." in name and not wanted[name].any() for name in unseen)
    assert len(hessians) > 70
    for name, hessian in hessians.items():
        # Windows within index_topk never ask wq_b; what it would read is what q_b_proj reads.
        expected = wanted[name.replace("indexer.wq_b", "q_b_proj")]
        assert torch.allclose(
            hessian.blocks[0].double(), expected, rtol=1e-3, atol=1e-4 * float(expected.max())
        ), name


def test_the_prior_is_the_average_token_of_the_layer(
    tmp_path: Path, hessians: dict[str, Hessian], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prior much larger than what an expert saw: its inputs are those of every token."""
    monkeypatch.setattr(layer_solver, "PRIOR", 1e4)
    save_source(tmp_path / "source", small_config(num_nextn_predict_layers=0))
    quantize(tmp_path / "source", tmp_path / "int4", RECIPE, calibration=windows())
    shared = hessians["model.layers.1.mlp.shared_experts.gate_proj.weight"].blocks[0]
    for expert in range(8):
        name = f"model.layers.1.mlp.experts.{expert}.gate_proj.weight"
        if name in hessians:
            found = hessians[name]
            assert torch.allclose(found.blocks[0] / found.count, shared / 132, rtol=1e-2, atol=1e-3)


# --- the result ---------------------------------------------------------------------------------------


@types
@pytest.mark.parametrize("stored", ["bf16", "fp8"])
def test_the_result_is_closer_to_its_source_than_with_nearest_codes(
    tmp_path: Path, model_type: str, stored: str
) -> None:
    """On text of the same kind. Every expert runs, so that no router turns a small error into a large one."""
    config = small_config(model_type, num_experts_per_tok=8, index_topk=4096, num_nextn_predict_layers=0)
    save_source(tmp_path / "source", config, stored=stored)
    # Few token ids: their embeddings fill less than the width, as real inputs do.
    calibration = Calibration(tuple(tuple(row) for row in random_ids(8, 32, vocab_size=24).tolist()))
    quantize(tmp_path / "source", tmp_path / "gptq", RECIPE, calibration=calibration)
    quantize(tmp_path / "source", tmp_path / "nearest", RECIPE)

    ids = random_ids(4, 32, vocab_size=24, seed=9)
    wanted = load_model(tmp_path / "source", dtype=torch.float32)(ids).logits
    lost = {way: spread(as_floats(tmp_path / way)(ids).logits, wanted) for way in ("gptq", "nearest")}
    assert lost["gptq"] < 0.9 * lost["nearest"], lost


def test_only_codes_and_scales_differ_from_the_nearest_method(tmp_path: Path) -> None:
    save_source(tmp_path / "source")
    receipt = quantize(tmp_path / "source", tmp_path / "gptq", RECIPE, calibration=windows())
    other = quantize(tmp_path / "source", tmp_path / "nearest", RECIPE)
    gptq, nearest = ShardIndex(tmp_path / "gptq"), ShardIndex(tmp_path / "nearest")
    assert sorted(gptq.names) == sorted(nearest.names)
    for name in gptq.names:
        found, wanted = (index.file(name).read(name) for index in (gptq, nearest))
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        if not name.endswith((".weight_packed", ".weight_scale")):
            assert torch.equal(found, wanted), name
    assert (tmp_path / "gptq/config.json").read_bytes() == (tmp_path / "nearest/config.json").read_bytes()
    assert not (tmp_path / "gptq" / WORKING).exists()
    assert receipt["method"] == "gptq" and receipt["calibration_tokens"] == 132
    assert other["method"] == "nearest" and "calibration_tokens" not in other
    for name, told in receipt["tensors"].items():
        if "output_error" in told:
            assert told["relative_error"] >= 0.9 * other["tensors"][name]["relative_error"]
    mean = {
        key: sum(told.get(key, 0.0) for told in receipt["tensors"].values())
        for key in ("output_error", "output_error_nearest")
    }
    assert 0 < mean["output_error"] < 0.9 * mean["output_error_nearest"]


def test_an_expert_without_tokens_gets_the_nearest_codes(tmp_path: Path) -> None:
    model = save_source(tmp_path / "source")
    model.model.layers[1].mlp.gate.e_score_correction_bias[3] = -100.0
    glm5.checkpoint.save_model(model, tmp_path / "shunned", stored="bf16")
    receipt = quantize(tmp_path / "shunned", tmp_path / "gptq", RECIPE, calibration=windows())
    quantize(tmp_path / "shunned", tmp_path / "nearest", RECIPE)
    gptq, nearest = ShardIndex(tmp_path / "gptq"), ShardIndex(tmp_path / "nearest")
    for projection in ("gate_proj", "up_proj", "down_proj"):
        module = f"model.layers.1.mlp.experts.3.{projection}"
        assert set(receipt["tensors"][f"{module}.weight"]) == {"bits", "group", "relative_error"}
        for suffix in ("weight_packed", "weight_scale"):
            name = f"{module}.{suffix}"
            assert torch.equal(gptq.file(name).read(name), nearest.file(name).read(name)), name


@pytest.mark.parametrize(
    ("changes", "keep"),
    [
        (["*.indexer.*=4", "*.eh_proj=4", "lm_head=8"], []),
        ([], ["*.mlp.experts.*", "*.q_b_proj", "*.wq_b", "*.gate_proj"]),
        ([], ["*"]),
    ],
    ids=["more", "fewer", "none"],
)
def test_recipes_of_every_kind(tmp_path: Path, changes: list[str], keep: list[str]) -> None:
    save_source(
        tmp_path / "source", small_config("glm_moe_dsa", index_n_heads=32, num_nextn_predict_layers=2)
    )
    recipe = Recipe.of(4, 32, changes, keep)
    receipt = quantize(tmp_path / "source", tmp_path / "int4", recipe, calibration=windows())
    indexers = [name for name in receipt["tensors"] if ".indexer." in name]
    assert all("output_error" in receipt["tensors"][name] for name in indexers)
    assert bool(indexers) == bool(changes)
    logits = load_model(tmp_path / "int4", dtype=torch.float32)(random_ids(1, 20)).logits
    assert torch.isfinite(logits).all()


def test_shards_do_not_change_the_codes(tmp_path: Path) -> None:
    """A walk that goes on from shard to shard, each forgetting the matrices it holds."""
    save_source(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "one", RECIPE, calibration=windows())
    quantize(tmp_path / "source", tmp_path / "many", RECIPE, calibration=windows(), shard_bytes=20_000)
    one, many = as_floats(tmp_path / "one"), as_floats(tmp_path / "many")
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, many.state_dict()[name]), name


def test_a_finished_shard_leaves_no_second_copy_of_its_codes(tmp_path: Path) -> None:
    save_source(tmp_path / "source")
    most: list[int] = []

    def count(done: int, total: int) -> None:
        most.append(len(list((tmp_path / "int4").rglob("*.solved"))))

    quantize(
        tmp_path / "source",
        tmp_path / "int4",
        RECIPE,
        calibration=windows(),
        shard_bytes=20_000,
        progress=count,
    )
    assert max(most) <= 5 + 27 + 12  # a layer's matrices, and those of a shard begun before it
    assert not list((tmp_path / "int4").rglob("*.solved"))


TRAINED = Path(__file__).parents[2] / "checkpoints" / "nano"


def test_the_embedded_model_answers_more_like_its_source(tmp_path: Path) -> None:
    source = TRAINED
    tokenizer = LanguageModel.load(source).tokenizer
    assert tokenizer is not None
    # Without the 640 experts, which take half a minute.
    recipe = Recipe.of(4, 32, [], ["*.mlp.experts.*", "model.layers.5.*"])
    calibration = Calibration.from_texts(tokenizer, num_tokens=2048)
    kl = {}
    for way, text in (("nearest", None), ("gptq", calibration)):
        quantize(source, tmp_path / way, recipe, calibration=text)
        kl[way] = evaluate(source, tmp_path / way)
    for language in ("en", "zh"):
        assert kl["gptq"][language]["kl"] < 0.8 * kl["nearest"][language]["kl"], kl
    assert contents(tmp_path / "gptq").keys() == contents(tmp_path / "nearest").keys()
