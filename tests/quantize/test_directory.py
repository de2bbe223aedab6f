"""A directory in, an int4 directory out, which we and the official reader find whole."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import glm5
from glm5.checkpoint import ShardIndex, names, save_model
from glm5.config import MODEL_TYPES, ModelConfig
from glm5.disk.safetensors_file import SafetensorsFile
from glm5.disk.shards import INDEX_FILE, SINGLE_FILE
from glm5.errors import CheckpointError, RequestError
from glm5.formats.packed import PROJECTIONS, Scheme
from glm5.formats.packing import words_per_row
from glm5.layers.fused_layer import FusedLayer
from glm5.layers.loading import load_model
from glm5.layers.native import NativeLinear
from glm5.layers.packed import PackedExperts, PackedLinear, TiedHead
from glm5.model.transformer import GlmForCausalLM
from glm5.quantize import Calibration, Recipe, quantize
from glm5.quantize.directory import ALIGNMENT, RECEIPT_FILE, WORKING, quantized_config
from glm5.quantize.plan import Item
from tests.checkpoint.checkpoint_fixture import assert_same_bits, refused, with_tensors
from tests.quantize.quantize_fixture import (
    IDS,
    RECIPE,
    all_weights,
    as_floats,
    contents,
    difference,
    save_source,
    small_config,
    smooth_config,
    spread,
)
from tests.quantize.quantize_fixture import exact_kernels as exact_kernels
from tests.quantize.quantize_fixture import no_flushing as no_flushing
from tests.quantize.quantize_fixture import no_gradients as no_gradients
from tests.runtime.language_model_fixture import tiny_language_model

pytestmark = pytest.mark.usefixtures("no_gradients")
SAME = 1e-4  # fp32, other orders of summation
CLOSE = 0.05  # root mean square, activations rounded to int8 through three layers
KEPT = re.compile(r"lm_head|.*\.(embed_tokens|mlp\.gate|eh_proj|self_attn\.indexer\.(wk|weights_proj))")
stored = pytest.mark.parametrize("stored", ["bf16", "fp16", "fp32", "fp8"])
types = pytest.mark.parametrize("model_type", MODEL_TYPES)


def relative_errors(directory: Path, source: GlmForCausalLM) -> dict[str, float]:
    """What each matrix lost, as a share of its size, by its name on disk."""
    found, wanted = names.state_tensors(as_floats(directory)), names.state_tensors(source)
    errors = {}
    for piece in names.pieces(source):
        values = piece.of(wanted[piece.parameter]).double()
        if values.dim() == 2:
            lost = piece.of(found[piece.parameter]).double() - values
            errors[piece.name] = float(lost.norm() / values.norm())
    return errors


# --- round trips ------------------------------------------------------------------------------------


@types
@stored
def test_a_packed_model_answers_as_its_dequantized_weights(
    tmp_path: Path, exact_kernels: None, stored: str, model_type: str
) -> None:
    save_source(tmp_path / "source", small_config(model_type), stored=stored)
    quantize(tmp_path / "source", tmp_path / "int4", RECIPE)

    packed, floats = load_model(tmp_path / "int4", dtype=torch.float32), as_floats(tmp_path / "int4")

    assert difference(packed(IDS).logits, floats(IDS).logits) < SAME
    kinds = {type(module) for module in packed.modules()}
    assert {PackedLinear, PackedExperts, FusedLayer, NativeLinear} <= kinds
    assert not {PackedLinear, PackedExperts} & {type(module) for module in floats.modules()}


@types
def test_rounded_activations_stay_close(tmp_path: Path, model_type: str) -> None:
    save_source(tmp_path / "source", smooth_config(model_type))
    quantize(tmp_path / "source", tmp_path / "int4", RECIPE)
    packed, floats = load_model(tmp_path / "int4", dtype=torch.float32), as_floats(tmp_path / "int4")
    for ids in (IDS, IDS[:, :1]):
        assert spread(packed(ids).logits, floats(ids).logits) < CLOSE
    half = load_model(tmp_path / "int4", dtype=torch.bfloat16)
    assert spread(half(IDS).logits, floats(IDS).logits) < 2 * CLOSE


@stored
def test_every_matrix_loses_what_the_receipt_says(tmp_path: Path, stored: str) -> None:
    save_source(tmp_path / "source", stored=stored)
    source = load_model(tmp_path / "source", dtype=torch.float32)
    recipe = Recipe.of(4, 32, ["*.shared_experts.*=8"], ["*.o_proj"])
    copied = 2**-9 if stored == "fp8" else 0  # as bf16
    receipt = quantize(tmp_path / "source", tmp_path / "int4", recipe)
    assert json.loads((tmp_path / "int4" / RECEIPT_FILE).read_text()) == receipt
    told = receipt["tensors"]
    for name, error in relative_errors(tmp_path / "int4", source).items():
        kept = KEPT.fullmatch(name.removesuffix(".weight")) or name.endswith("o_proj.weight")
        assert (name not in told) == bool(kept), name
        bits = 0 if kept else 8 if "shared_experts" in name else 4
        low, high = {0: (0, copied), 8: (0.001, 0.008), 4: (0.03, 0.11)}[bits]
        assert low <= error <= high, (name, error)
        if not kept:
            assert told[name] == {"bits": bits, "group": 32, "relative_error": pytest.approx(error, abs=1e-5)}


@stored
def test_rounding_while_loading_gives_the_same_logits(tmp_path: Path, stored: str) -> None:
    """In bf16, which is what FP8 becomes on either way."""
    save_source(tmp_path / "source", stored=stored)
    recipe = Recipe.of(4, 32, ["*.shared_experts.*=8", "lm_head=4"], ["model.layers.2.mlp.experts.*"])
    quantize(tmp_path / "source", tmp_path / "int4", recipe)
    for dtype in (torch.bfloat16, torch.float32)[: 1 if stored == "fp8" else 2]:
        once = load_model(tmp_path / "int4", dtype=dtype)
        while_loading = load_model(tmp_path / "source", dtype=dtype, quantize=recipe.scheme_of)
        assert torch.equal(once(IDS).logits, while_loading(IDS).logits)
        assert [type(m) for m in once.modules()] == [type(m) for m in while_loading.modules()]


def test_the_public_door_opens_it(tmp_path: Path) -> None:
    widths = {"moe_intermediate_size": 64, "q_lora_rank": 64, "v_head_dim": 24}
    model = tiny_language_model(**widths)
    model.save_pretrained(tmp_path / "source", stored="bf16")
    quantize(tmp_path / "source", tmp_path / "int4", RECIPE)
    loaded = glm5.load(tmp_path / "int4", dtype="auto")
    assert loaded.tokenizer.encode("The fox, 北京") == model.tokenizer.encode("The fox, 北京")
    assert loaded.config.eos_token_id == model.config.eos_token_id
    assert loaded.generate(IDS[:1, :5], max_new_tokens=4, eos_token_id=[]).shape == (1, 9)
    by_source = glm5.load(tmp_path / "source", dtype="auto", load_in_4bit=True)
    assert by_source.lm_head.scheme.bits == 8  # which costs nothing that can be measured
    quantize(tmp_path / "source", tmp_path / "head8", replace(RECIPE, rules=(*RECIPE.rules, ("lm_head", 8))))
    assert torch.equal(by_source(IDS).logits, glm5.load(tmp_path / "head8", dtype="auto")(IDS).logits)
    again = glm5.load(tmp_path / "int4", dtype="auto", load_in_4bit=True)  # nothing left to round
    assert torch.equal(again(IDS).logits, loaded(IDS).logits)


def test_eight_bits_are_not_called_four(tmp_path: Path) -> None:
    tiny_language_model(**{"moe_intermediate_size": 64, "q_lora_rank": 64, "v_head_dim": 24}).save_pretrained(
        tmp_path / "source", stored="bf16"
    )
    quantize(tmp_path / "source", tmp_path / "int8", Recipe(8, 32))
    with pytest.raises(RequestError, match="packed in 8 bits; load it without load_in_4bit"):
        glm5.load(tmp_path / "int8", load_in_4bit=True)
    assert glm5.load(tmp_path / "int8").lm_head is not None


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_stays_with_the_embedding(tmp_path: Path, exact_kernels: None, tied: bool) -> None:
    save_source(tmp_path / "source", small_config(tie_word_embeddings=tied))
    quantize(tmp_path / "source", tmp_path / "int4", RECIPE)
    packed, floats = load_model(tmp_path / "int4", dtype=torch.float32), as_floats(tmp_path / "int4")
    assert difference(packed(IDS).logits, floats(IDS).logits) < SAME
    assert ("lm_head.weight" in ShardIndex(tmp_path / "int4")) == (not tied)
    assert "lm_head" in settings_of(tmp_path / "int4")["ignore"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("calibrated", [False, True])
def test_an_embedding_is_packed_where_a_pattern_spells_it(
    tmp_path: Path, exact_kernels: None, tied: bool, calibrated: bool
) -> None:
    source = save_source(tmp_path / "source", small_config(tie_word_embeddings=tied))
    text = Calibration(tuple(map(tuple, IDS.tolist()))) if calibrated else None
    quantize(
        tmp_path / "source",
        tmp_path / "int4",
        Recipe.of(4, 32, ["*.embed_tokens=8:64"], []),
        calibration=text,
    )
    packed, floats = load_model(tmp_path / "int4", dtype=torch.float32), as_floats(tmp_path / "int4")
    embedding: Any = packed.model.embed_tokens
    assert (embedding.scheme, packed.dtype) == (Scheme(8, 64), torch.float32)
    assert torch.equal(embedding(IDS), floats.model.embed_tokens(IDS))
    assert 0 < spread(floats.model.embed_tokens(IDS), source.model.embed_tokens(IDS)) < 0.01
    assert isinstance(packed.lm_head, TiedHead) == tied
    assert difference(packed(IDS).logits, floats(IDS).logits) < SAME
    in_bf16 = load_model(tmp_path / "int4", dtype=torch.bfloat16)
    assert in_bf16.model.embed_tokens(IDS).dtype == in_bf16(IDS).logits.dtype == torch.bfloat16
    assert in_bf16.float().model.embed_tokens(IDS).dtype == torch.float32


# --- mixed recipes ----------------------------------------------------------------------------------

MIXED: dict[str, Any] = {
    "attention": (["*.self_attn.[qo]*=8"], []),
    "dense and shared": (["*.shared_experts.*=8", "model.layers.0.mlp.*=8"], []),
    "mostly 8": (["*=8", "*.kv_b_proj=keep", "*.experts.*=4"], []),
    "head": (["lm_head=8"], []),
    "no experts": ([], ["*.mlp.experts.*"]),
    "experts of a layer": ([], ["model.layers.1.mlp.experts.*"]),
    "one layer": (["model.layers.2.*=8", "model.layers.2.*.kv_b_proj=keep"], []),
    "one matrix": (["model.layers.1.self_attn.o_proj=8"], []),
    "all of attention": (["*.self_attn.*=8"], []),
}


@pytest.mark.parametrize(("changes", "keep"), MIXED.values(), ids=MIXED.keys())
def test_mixed_bits_come_back(
    tmp_path: Path, exact_kernels: None, changes: list[str], keep: list[str]
) -> None:
    save_source(tmp_path / "source")
    recipe = Recipe.of(4, 32, changes, keep)
    quantize(tmp_path / "source", tmp_path / "mixed", recipe)
    packed, floats = load_model(tmp_path / "mixed", dtype=torch.float32), as_floats(tmp_path / "mixed")
    assert difference(packed(IDS).logits, floats(IDS).logits) < SAME
    while_loading = load_model(tmp_path / "source", dtype=torch.float32, quantize=recipe.scheme_of)
    assert torch.equal(packed(IDS).logits, while_loading(IDS).logits)


@pytest.mark.parametrize("rule", ["*.experts.3.*=8", "*.experts.*.down_proj=8", "*.experts.3.*=keep"])
def test_a_recipe_that_parts_the_experts_of_a_layer_is_refused_before_writing(
    tmp_path: Path, rule: str
) -> None:
    save_source(tmp_path / "source")
    recipe = Recipe.of(4, 32, [rule], [])
    with refused(CheckpointError, "experts"):
        quantize(tmp_path / "source", tmp_path / "mixed", recipe)
    assert not list(tmp_path.glob("mixed/**/*.safetensors"))


def test_a_recipe_that_keeps_everything_gives_a_plain_copy(tmp_path: Path) -> None:
    save_source(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "copy", Recipe.of(4, 32, [], ["*"]))
    copy, source = (load_model(tmp_path / name, dtype=torch.float32) for name in ("copy", "source"))
    assert torch.equal(copy(IDS).logits, source(IDS).logits)
    assert "quantization_config" not in json.loads((tmp_path / "copy" / "config.json").read_text())


# --- what the files hold ----------------------------------------------------------------------------


def settings_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def targets_of(recipe: Recipe) -> list[list[str]]:
    """What config.json names for each group of a model with two expert layers."""
    experts = [f"model.layers.{layer}.mlp.experts.{expert}" for layer in (1, 2) for expert in range(12)]
    modules = ["lm_head", *(f"{path}.{name}" for path in experts for name in PROJECTIONS)]
    items = [
        Item(
            f"{module}.weight", (64, 64), torch.bfloat16, 8192, recipe.scheme_of(module), module != "lm_head"
        )
        for module in modules
    ]
    extra = quantized_config(small_config(), items).extra["quantization_config"]
    return [group["targets"] for group in extra["config_groups"].values()]


def test_targets_do_not_grow_with_the_experts() -> None:
    (few, many) = sorted(targets_of(Recipe.of(4, 32, ["*.layers.1.*=8", "lm_head=8"], [])), key=len)
    assert few == [
        rf"re:model\.layers\.2\.mlp\.experts\.\d+\.{name}$" for name in ("down_proj", "gate_proj", "up_proj")
    ]
    assert many[0] == "re:lm_head$" and len(many) == 4 and all(r"layers\.1\." in text for text in many[1:])
    (one, rest) = sorted(targets_of(Recipe.of(4, 32, ["*.layers.1.mlp.experts.3.up_proj=8"], [])), key=len)
    assert one == [r"re:model\.layers\.1\.mlp\.experts\.3\.up_proj$"]
    assert r"re:model\.layers\.2\.mlp\.experts\.\d+\.up_proj$" in rest and len(rest) == 3 + 11


def test_a_head_of_one_scheme_is_named_for_vllm() -> None:
    assert targets_of(Recipe.of(8, 32, ["lm_head=8"], [])) == [["Linear", "re:lm_head$"]]
    assert targets_of(Recipe(8, 32)) == [["Linear"]]


@types
def test_the_config_tells_other_readers_all(tmp_path: Path, model_type: str) -> None:
    config = small_config(model_type)
    save_source(tmp_path / "source", config, stored="fp8")
    quantize(tmp_path / "source", tmp_path / "int4", RECIPE)
    index, settings = ShardIndex(tmp_path / "int4"), settings_of(tmp_path / "int4")

    assert settings["quant_method"] == "compressed-tensors"
    assert settings["format"] == "pack-quantized"
    assert settings["quantization_status"] == "compressed"
    assert [group["targets"] for group in settings["config_groups"].values()] == [["Linear"]]
    weights = settings["config_groups"]["group_0"]["weights"]
    wanted = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    assert wanted.items() <= weights.items()
    # Each matrix is packed or named as one that is not.
    packed = {name.removesuffix(".weight_packed") for name in index.names if name.endswith("weight_packed")}
    matrices = {name.removesuffix(".weight") for name in index.names if len(index[name].shape) == 2}
    plain = {name for name in matrices if f"{name}.weight" in index}
    assert settings["ignore"] == sorted(plain)
    assert all(KEPT.fullmatch(module) for module in plain)
    assert not any(KEPT.fullmatch(module) for module in packed)
    assert {name.split(".")[2] for name in packed} == {"0", "1", "2", "3"}  # the MTP layer too
    read = ModelConfig.from_pretrained(tmp_path / "int4")
    assert read.dtype == "bfloat16"
    changed = {"dtype", "quantization_config"}
    wanted = {key: value for key, value in config.to_dict().items() if key not in changed}
    assert {key: value for key, value in read.to_dict().items() if key not in changed} == wanted


def test_the_official_reader_finds_words_scales_and_shapes(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "int4", Recipe.of(4, 32, ["*.o_proj=8"], []), shard_bytes=60_000)
    weight_map = json.loads((tmp_path / "int4" / INDEX_FILE).read_text())
    shapes = {p.name: p.of(names.state_tensors(source)[p.parameter]).shape for p in names.pieces(source)}
    found: dict[str, Any] = {}
    for path in sorted((tmp_path / "int4").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118
                assert weight_map["weight_map"][name] == path.name
                found[name] = file.get_tensor(name)
    assert found.keys() == weight_map["weight_map"].keys()
    assert weight_map["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if f"{module}.weight_packed" not in found:
            assert found[name].shape == shape
            continue
        rows, columns = shape
        words, scales = found[f"{module}.weight_packed"], found[f"{module}.weight_scale"]
        bits = 8 if name.endswith("o_proj.weight") else 4
        assert (words.shape, words.dtype) == ((rows, words_per_row(columns, bits)), torch.int32)
        assert (scales.shape, scales.dtype) == ((rows, columns // 32), torch.bfloat16)
        assert found[f"{module}.weight_shape"].tolist() == [rows, columns]
        assert found[f"{module}.weight_shape"].dtype == torch.int64


def expert_runs(path: Path) -> dict[str, list[tuple[int, int]]]:
    """Where the words and scales of each expert lie in a file, in the order gate, up, down."""
    file, runs = SafetensorsFile(path), {}
    for info in file.tensors.values():
        match = re.fullmatch(r"(.+\.experts\.\d+)\.(gate|up|down)_proj\.weight_(packed|scale)", info.name)
        if match:
            runs.setdefault(match[1], []).append((match[2], match[3], info.start, info.end))
    order = [(name, part) for name in ("gate", "up", "down") for part in ("packed", "scale")]
    for expert, parts in runs.items():
        assert [part[:2] for part in parts] == order, expert
    return {expert: [part[2:] for part in parts] for expert, parts in runs.items()}


@pytest.mark.parametrize("shard_bytes", [10**9, 400_000])
def test_an_expert_is_one_run_on_a_page_boundary(tmp_path: Path, shard_bytes: int) -> None:
    """256 x 256 in groups of 32: an expert is 27 pages of 4 KiB."""
    config = small_config(
        hidden_size=256, moe_intermediate_size=256, num_hidden_layers=2, num_nextn_predict_layers=0
    )
    save_source(tmp_path / "source", config)
    quantize(tmp_path / "source", tmp_path / "int4", RECIPE, shard_bytes=shard_bytes)
    experts = 0
    for path in (tmp_path / "int4").glob("*.safetensors"):
        for expert, parts in expert_runs(path).items():
            assert parts[0][0] % ALIGNMENT == 0, expert
            assert all(end == start for (_, end), (start, _) in pairwise(parts)), expert
            experts += 1
    assert experts == 8


def test_experts_of_any_size_stay_together_and_first(tmp_path: Path) -> None:
    save_source(tmp_path / "source")
    for shard_bytes in (1, 30_000, 10**9):
        place = tmp_path / str(shard_bytes)
        quantize(tmp_path / "source", place, RECIPE, shard_bytes=shard_bytes)
        paths, experts = list(place.glob("*.safetensors")), 0
        for path in paths:
            starts = {name: info.start for name, info in SafetensorsFile(path).tensors.items()}
            assert min(starts.values()) % ALIGNMENT == 0
            runs = expert_runs(path)
            for parts in runs.values():
                assert all(end == start for (_, end), (start, _) in pairwise(parts))
            if runs:
                last = max(parts[-1][1] for parts in runs.values())
                others = [
                    at for name, at in starts.items() if not re.search(r"experts\.\d+\..*(ed|scale)$", name)
                ]
                assert all(at >= last for at in others)
            experts += len(runs)
        assert experts == 24  # two layers and the MTP layer
        assert (len(paths) == 1) == (shard_bytes == 10**9) == ((place / SINGLE_FILE).exists())
        assert torch.equal(load_model(place)(IDS).logits, load_model(tmp_path / "1")(IDS).logits)


def test_the_receipt_counts_bytes(tmp_path: Path) -> None:
    save_source(tmp_path / "source")
    receipt = quantize(tmp_path / "source", tmp_path / "int4", RECIPE)
    index, source = ShardIndex(tmp_path / "int4"), ShardIndex(tmp_path / "source")
    assert receipt["total_bytes"] == sum(index[name].num_bytes for name in index.names)
    assert receipt["source_bytes"] == sum(source[name].num_bytes for name in source.names)
    assert receipt["recipe"] == {"bits": 4, "group": 32, "rules": []}
    assert 4.5 < receipt["bits_per_quantized_weight"] < 4.6
    assert 0 < receipt["bytes_per_token"] < receipt["total_bytes"]


def test_side_files_go_along_and_nothing_else(tmp_path: Path) -> None:
    tiny_language_model(moe_intermediate_size=64, q_lora_rank=64, v_head_dim=24).save_pretrained(
        tmp_path / "a"
    )
    (tmp_path / "a" / "LICENSE").write_text("as the source's")
    (tmp_path / "a" / "notes.py").write_text("print('no')")
    quantize(tmp_path / "a", tmp_path / "b", RECIPE)
    before, after = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert set(after) == set(before) - {"notes.py"} | {RECEIPT_FILE}
    for name in set(after) - {RECEIPT_FILE, "config.json", SINGLE_FILE}:
        assert after[name] == before[name], name


def test_progress_rises_to_all_of_the_source(tmp_path: Path) -> None:
    save_source(tmp_path / "source")
    calls: list[tuple[int, int]] = []
    receipt = quantize(
        tmp_path / "source",
        tmp_path / "int4",
        RECIPE,
        shard_bytes=60_000,
        progress=lambda *c: calls.append(c),
    )
    assert {total for _, total in calls} == {receipt["source_bytes"]}
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] == receipt["source_bytes"]


def test_the_same_call_gives_the_same_bytes(tmp_path: Path) -> None:
    save_source(tmp_path / "source")
    for place in ("a", "b"):
        quantize(str(tmp_path / "source"), str(tmp_path / place), RECIPE, shard_bytes=60_000)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert not (tmp_path / "a" / WORKING).exists()


# --- other sources ----------------------------------------------------------------------------------


def fuse_experts(directory: Path, model: GlmForCausalLM) -> None:
    """As `transformers` saves them with save_original_format=False."""

    def fuse(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".mlp.experts." in name]:
            del tensors[name]
        for name, tensor in names.state_tensors(model).items():
            if ".mlp.experts." in name:
                tensors[names.disk_name(name, model.config)] = tensor.detach().bfloat16()

    with_tensors(directory, fuse)


def test_experts_stored_as_one_bank_are_read(tmp_path: Path) -> None:
    model = save_source(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "wanted", RECIPE)
    fuse_experts(tmp_path / "source", model)
    quantize(tmp_path / "source", tmp_path / "int4", RECIPE)
    assert contents(tmp_path / "int4") == contents(tmp_path / "wanted")


@types
@pytest.mark.parametrize(("changes", "keep"), [([], []), ([], ["model.layers.2.mlp.experts.*"])])
def test_experts_stored_as_one_bank_are_rounded_while_loading(
    tmp_path: Path, model_type: str, changes: list[str], keep: list[str]
) -> None:
    recipe = Recipe.of(4, 32, changes, keep)
    model = save_source(tmp_path / "source", small_config(model_type))
    fuse_experts(tmp_path / "source", model)
    quantize(tmp_path / "source", tmp_path / "int4", recipe)
    calls: list[tuple[int, int]] = []
    found = load_model(
        tmp_path / "source", quantize=recipe.scheme_of, progress=lambda *call: calls.append(call)
    )
    assert_same_bits(all_weights(found), all_weights(load_model(tmp_path / "int4")))
    index = ShardIndex(tmp_path / "source")
    assert calls[-1] == (sum(index[name].num_bytes for name in index.names),) * 2


def test_the_weights_of_others_are_rounded_again(tmp_path: Path, exact_kernels: None) -> None:
    """An int8 directory (without our mark) is a source like any other."""
    save_source(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "int8", Recipe(8, 32))
    path = tmp_path / "int8" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["glm5"]
    path.write_text(json.dumps(config))
    quantize(tmp_path / "int8", tmp_path / "int4", RECIPE)
    packed, floats = load_model(tmp_path / "int4", dtype=torch.float32), as_floats(tmp_path / "int4")
    assert difference(packed(IDS).logits, floats(IDS).logits) < SAME
    for name, error in relative_errors(tmp_path / "int4", as_floats(tmp_path / "int8")).items():
        assert error < 0.11, name


@types
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_gguf_file_is_a_source(tmp_path: Path, exact_kernels: None, model_type: str, kind: str) -> None:
    fixture = pytest.importorskip("tests.checkpoint.gguf.gguf_fixture")
    model = fixture.lively_model(small_config(model_type))
    path = fixture.write_model(tmp_path / "model.gguf", model, kind)
    quantize(path, tmp_path / "int4", RECIPE, shard_bytes=100_000)
    packed, floats = load_model(tmp_path / "int4", dtype=torch.float32), as_floats(tmp_path / "int4")
    assert difference(packed(IDS).logits, floats(IDS).logits) < SAME
    for name, error in relative_errors(tmp_path / "int4", model).items():
        assert error < 0.11, name
    assert packed.config.model_type == model_type


def test_a_model_without_experts_or_mtp_is_quantized(tmp_path: Path, exact_kernels: None) -> None:
    config = small_config(first_k_dense_replace=3, num_nextn_predict_layers=0, mlp_layer_types=None)
    save_source(tmp_path / "source", config)
    quantize(tmp_path / "source", tmp_path / "int4", RECIPE)
    packed, floats = load_model(tmp_path / "int4", dtype=torch.float32), as_floats(tmp_path / "int4")
    assert difference(packed(IDS).logits, floats(IDS).logits) < SAME


def test_an_int4_model_is_not_saved_from_memory(tmp_path: Path) -> None:
    save_source(tmp_path / "source")
    model = load_model(tmp_path / "source", quantize=RECIPE.scheme_of)
    with refused(CheckpointError, "packed integers"):
        save_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
