"""What cannot be quantized is refused in one line, before anything is written that looks like a model."""

from __future__ import annotations

import os
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from glm5.disk.shards import SINGLE_FILE
from glm5.errors import CheckpointError, ConfigError, Glm5Error, RecipeError
from glm5.layers.loading import load_model
from glm5.quantize import Recipe, quantize
from tests.checkpoint.checkpoint_fixture import Tensors, refused, with_json, with_tensors
from tests.quantize.quantize_fixture import RECIPE, contents, save_source, small_config
from tests.quantize.quantize_fixture import no_flushing as no_flushing

O_PROJ = "model.layers.1.self_attn.o_proj.weight"
UP = "model.layers.2.mlp.experts.5.up_proj.weight"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    for stored in ("bf16", "fp32", "fp8"):
        save_source(root / stored, stored=stored)
    return {stored: root / stored for stored in ("bf16", "fp32", "fp8")}


@pytest.fixture
def source(sources: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(sources["bf16"], tmp_path / "source"))


def assert_nothing_written(destination: Path) -> None:
    """Neither shards nor a config; at most the plan of the job."""
    left = {path.name for path in destination.rglob("*") if path.is_file()}
    assert left <= {"plan.json"}, left
    with pytest.raises(Glm5Error):
        load_model(destination)


# --- weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["bf16", "fp32"])
@pytest.mark.parametrize("name", [O_PROJ, UP])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_weight_that_is_not_finite_is_named(
    tmp_path: Path, sources: dict[str, Path], stored: str, name: str, value: float
) -> None:
    source = Path(shutil.copytree(sources[stored], tmp_path / "source"))
    with_tensors(source, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    with refused(CheckpointError, source, name, "cannot be quantized"):
        quantize(source, tmp_path / "int4", RECIPE)
    assert_nothing_written(tmp_path / "int4")
    with refused(CheckpointError, source, name, "cannot be quantized"):
        load_model(source, quantize=RECIPE.scheme_of)


def test_a_broken_weight_in_a_late_shard_leaves_no_checkpoint(tmp_path: Path, source: Path) -> None:
    with_tensors(source, lambda tensors: tensors[UP].view(-1)[:1].fill_(float("nan")))
    with refused(CheckpointError, UP):
        quantize(source, tmp_path / "int4", RECIPE, shard_bytes=50_000)
    assert not (tmp_path / "int4" / "config.json").exists()
    assert not list((tmp_path / "int4").glob("*.safetensors"))
    assert not list((tmp_path / "int4").rglob("*.tmp"))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_of_fp8_is_refused(tmp_path: Path, sources: dict[str, Path], code: int) -> None:
    source = Path(shutil.copytree(sources["fp8"], tmp_path / "source"))
    with_tensors(source, lambda tensors: tensors[O_PROJ].view(torch.uint8).view(-1)[7:8].fill_(code))
    with refused(CheckpointError, O_PROJ):
        quantize(source, tmp_path / "int4", RECIPE)
    assert_nothing_written(tmp_path / "int4")


def contradicting(tensors: Tensors) -> None:
    tensors[O_PROJ] = torch.zeros(64, 64).bfloat16()


def flat(tensors: Tensors) -> None:
    tensors[O_PROJ] = torch.zeros(64 * 96).bfloat16()


def left_over(tensors: Tensors) -> None:
    tensors["model.layers.1.self_attn.gate.weight"] = torch.zeros(64, 64).bfloat16()


def as_integers(tensors: Tensors) -> None:
    tensors[O_PROJ] = torch.zeros(64, 96, dtype=torch.int8)


def missing(tensors: Tensors) -> None:
    del tensors[O_PROJ]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (missing, "is missing"),
        (as_integers, "stored as I8"),
        (contradicting, "has shape"),
        (flat, "has shape"),
        (left_over, "has no place"),
    ],
)  # fmt: skip
def test_a_source_that_load_model_refuses_is_refused(
    tmp_path: Path, source: Path, change: Callable[[Tensors], None], word: str
) -> None:
    with_tensors(source, change)
    with refused(CheckpointError, word):
        load_model(source)
    with refused(CheckpointError, word):
        quantize(source, tmp_path / "int4", RECIPE)
    assert not (tmp_path / "int4").exists()


BANK = "model.layers.2.mlp.experts"


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((7, 128, 64), torch.bfloat16, (f"{BANK}.gate_up_proj has shape [7, 128, 64]", "[8, 128, 64]")),
        ((9, 128, 64), torch.bfloat16, (f"{BANK}.gate_up_proj has shape [9, 128, 64]", "[8, 128, 64]")),
        ((8, 132, 64), torch.bfloat16, (f"{BANK}.gate_up_proj has shape [8, 132, 64]", "[8, 128, 64]")),
        ((8, 128), torch.bfloat16, (f"{BANK}.gate_up_proj has shape [8, 128]", "[8, 128, 64]")),
        ((8, 128, 64), torch.int8, (f"{BANK}.gate_up_proj is stored as I8",)),
        ((8, 128, 64), torch.float8_e4m3fn, (f"{BANK}.gate_up_proj is",)),
    ],
)
def test_a_bank_of_experts_that_does_not_fit_is_refused(
    tmp_path: Path, source: Path, shape: tuple[int, ...], dtype: torch.dtype, words: tuple[str, ...]
) -> None:
    def fuse(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(BANK) and "down_proj" not in name]:
            del tensors[name]
        tensors[f"{BANK}.gate_up_proj"] = torch.zeros(shape).to(dtype)

    with_tensors(source, fuse)
    with refused(CheckpointError, source, *words):
        quantize(source, tmp_path / "int4", RECIPE)
    assert not (tmp_path / "int4").exists()
    with refused(CheckpointError, source, *words):
        load_model(source, quantize=RECIPE.scheme_of)


def test_an_expert_beside_its_bank_is_refused(tmp_path: Path, source: Path) -> None:
    def both(tensors: Tensors) -> None:
        for name in [name for name in tensors if re.match(rf"{BANK}\.[1-7]\.(gate|up)", name)]:
            del tensors[name]
        tensors[f"{BANK}.gate_up_proj"] = torch.zeros(8, 128, 64).bfloat16()

    with_tensors(source, both)
    words = (f"{BANK}.0.gate_proj.weight is stored a second time within {BANK}.gate_up_proj",)
    with refused(CheckpointError, source, *words):
        quantize(source, tmp_path / "int4", RECIPE)
    with refused(CheckpointError, source, *words):
        load_model(source, quantize=RECIPE.scheme_of)


def test_a_broken_weight_in_a_bank_is_named(tmp_path: Path, source: Path) -> None:
    def fuse(tensors: Tensors) -> None:
        down = [tensors.pop(f"{BANK}.{expert}.down_proj.weight") for expert in range(8)]
        down[5][3, 3] = float("nan")
        tensors[f"{BANK}.down_proj"] = torch.stack(down)

    with_tensors(source, fuse)
    for job in (
        lambda: quantize(source, tmp_path / "int4", RECIPE),
        lambda: load_model(source, quantize=RECIPE.scheme_of),
    ):
        with refused(CheckpointError, source, f"{BANK}.5.down_proj.weight", "cannot be quantized"):
            job()


# --- groups -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "group", "name", "advice"),
    [
        ({}, 64, "model.layers.0.self_attn.kv_b_proj.weight", "32 wide|--group 32"),
        ({"kv_lora_rank": 64}, 64, "model.layers.0.self_attn.o_proj.weight", "96 wide|--group 32"),
        ({"hidden_size": 96}, 64, "model.layers.0.self_attn.q_a_proj.weight", "96 wide|--group 32"),
        (
            {"moe_intermediate_size": 40},
            32,
            "model.layers.1.mlp.experts.0.down_proj.weight",
            "40 wide|--keep",
        ),
        ({"q_lora_rank": 48}, 32, "model.layers.0.self_attn.q_b_proj.weight", "48 wide|--keep"),
    ],
)
def test_a_group_that_does_not_divide_is_refused_with_advice(
    tmp_path: Path, changes: dict[str, Any], group: int, name: str, advice: str
) -> None:
    save_source(tmp_path / "source", small_config(**changes))
    with refused(CheckpointError, tmp_path / "source", name, *advice.split("|")):
        quantize(tmp_path / "source", tmp_path / "int4", Recipe(4, group))
    assert not (tmp_path / "int4").exists()


def test_the_advice_to_keep_a_module_helps(tmp_path: Path) -> None:
    save_source(tmp_path / "source", small_config(q_lora_rank=48))
    recipe = Recipe.of(4, 32, [], ["*.q_b_proj"])
    quantize(tmp_path / "source", tmp_path / "int4", recipe)
    assert load_model(tmp_path / "int4").model.layers[0].self_attn.q_b_proj.weight.shape == (96, 48)


def test_while_loading_widths_without_whole_groups_stay_floats(tmp_path: Path) -> None:
    save_source(tmp_path / "source", small_config(q_lora_rank=48))
    attention = load_model(tmp_path / "source", quantize=RECIPE.scheme_of).model.layers[0].self_attn
    assert attention.q_b_proj.weight.dtype == torch.bfloat16
    assert attention.q_a_proj.words.dtype == torch.int32


# --- patterns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "advice"),
    [
        ("*.self_atn.*", "did you mean '*.self_attn.*'"),
        ("self_attn.*", "did you mean '*.self_attn.*'"),
        ("self_attn", "did you mean '*.self_attn.*'"),
        ("o_porj", "did you mean '*.o_proj'"),
        ("*.mlp.experts", "did you mean '*.mlp.experts.*'"),
        ("model.layers.0.self_attn.o_proj.weight", "did you mean 'model.layers.0.self_attn.o_proj'"),
        ("*.Shared_Experts.up_proj", "did you mean '*.shared_experts.up_proj'"),
        ("model.layers.77.*", "named like model.layers.0.self_attn.q_a_proj"),
        ("model.layers.0.mlp.experts.*", "named like model.layers.0.self_attn.q_a_proj"),
        ("re:.*o_proj$", "named like model.layers.0.self_attn.q_a_proj"),
        ("a\nb", "named like model.layers.0.self_attn.q_a_proj"),
    ],
)
@pytest.mark.parametrize("bits", [0, 8])
def test_a_pattern_that_fits_no_module_is_named_with_advice(
    tmp_path: Path, source: Path, pattern: str, advice: str, bits: int
) -> None:
    with refused(RecipeError, repr(pattern), "fits no module", source, advice):
        quantize(source, tmp_path / "int4", Recipe(4, 32, (("*.o_proj", 8), (pattern, bits))))
    assert not (tmp_path / "int4").exists()


@pytest.mark.parametrize(
    ("pattern", "module"),
    [
        ("*norm*", "model.layers.0.input_layernorm"),
        ("model.norm", "model.norm"),
        ("*.mlp.gate", "model.layers.1.mlp.gate"),
        ("lm_head", "lm_head"),
    ],
)
def test_a_pattern_that_fits_only_what_is_never_quantized_says_so(
    tmp_path: Path, pattern: str, module: str
) -> None:
    save_source(tmp_path / "source", small_config(tie_word_embeddings=True))
    for rule in ((pattern, 8), (pattern, 0)):
        with refused(
            RecipeError, repr(pattern), f"such as {module},", "never quantized", tmp_path / "source"
        ):
            quantize(tmp_path / "source", tmp_path / "int4", Recipe(4, 32, (rule,)))
    assert not (tmp_path / "int4").exists()


def test_a_group_of_a_pattern_that_fills_no_width_is_told_with_the_pattern(
    tmp_path: Path, source: Path
) -> None:
    with refused(CheckpointError, "model.embed_tokens.weight", "64 wide", "a pattern that ends in :64"):
        quantize(source, tmp_path / "int4", Recipe(4, 32, (("*.embed_tokens", 8, 96),)))
    assert not (tmp_path / "int4").exists()


def test_a_mistyped_pattern_counts_before_the_group_that_it_was_to_keep(tmp_path: Path) -> None:
    save_source(tmp_path / "source", small_config(q_lora_rank=48))
    with refused(RecipeError, "'*.q_b_porj'", "did you mean '*.q_b_proj'"):
        quantize(tmp_path / "source", tmp_path / "int4", Recipe.of(4, 32, [], ["*.q_b_porj"]))


# --- places -----------------------------------------------------------------------------------------


def test_a_destination_with_a_checkpoint_is_left_alone(tmp_path: Path, source: Path) -> None:
    quantize(source, tmp_path / "int4", RECIPE)
    before = contents(tmp_path)
    for destination, words in ((tmp_path / "int4", "holds a checkpoint already"), (source, "is the source")):
        for restart in (False, True):
            with refused(CheckpointError, destination, words):
                quantize(source, destination, RECIPE, restart=restart)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", [SINGLE_FILE, "model-00003-of-00007.safetensors"])
def test_weights_without_a_config_are_left_alone(tmp_path: Path, source: Path, name: str) -> None:
    """A download whose config.json has not arrived yet."""
    (tmp_path / "int4").mkdir()
    (tmp_path / "int4" / name).write_bytes(b"someone's weights")
    with suppress(CheckpointError):
        quantize(source, tmp_path / "int4", RECIPE)
    assert (tmp_path / "int4" / name).read_bytes() == b"someone's weights"


def test_a_file_is_no_destination(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with refused(CheckpointError, tmp_path / "file", "cannot be written"):
        quantize(source, tmp_path / "file", RECIPE)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_disk_that_is_too_small_is_told_before_writing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 10_000_000))
        with refused(CheckpointError, tmp_path / "int4", "0.1 GB are needed", "0.0 GB", "another directory"):
            quantize(source, tmp_path / "int4", RECIPE)
    assert_nothing_written(tmp_path / "int4")
    quantize(source, tmp_path / "int4", RECIPE)
    load_model(tmp_path / "int4")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_may_not_be_written_is_told(tmp_path: Path, source: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with refused(CheckpointError, tmp_path / "locked", "cannot be written"):
        quantize(source, tmp_path / "locked" / "int4", RECIPE)


# --- sources ----------------------------------------------------------------------------------------


def test_what_glm5_has_quantized_is_no_source(tmp_path: Path, source: Path) -> None:
    quantize(source, tmp_path / "int4", RECIPE)
    with refused(CheckpointError, tmp_path / "int4", "quantized by glm5 already"):
        quantize(tmp_path / "int4", tmp_path / "again", Recipe(8, 32))
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "bitsandbytes"},
        {"quant_method": 4},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "config_groups": {}, "format": "pack-quantized"},
        [],
        "int4",
    ],
    ids=str,
)
def test_a_scheme_that_nobody_knows_is_refused(tmp_path: Path, source: Path, settings: Any) -> None:
    with_json(source / "config.json", lambda config: config.update(quantization_config=settings))
    if not settings:  # an empty list counts as none
        quantize(source, tmp_path / "int4", RECIPE)
        return
    with refused(CheckpointError, source / "config.json", "quantization_config"):
        quantize(source, tmp_path / "int4", RECIPE)
    assert not (tmp_path / "int4").exists()


def test_a_source_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.bin").write_bytes(b"pickled")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not for long")
    for name, error in (
        ("nowhere", CheckpointError),
        ("model.bin", CheckpointError),
        ("broken.gguf", CheckpointError),
        ("missing.gguf", CheckpointError),
        ("empty", ConfigError),
    ):
        with refused(error, tmp_path / name):
            quantize(tmp_path / name, tmp_path / "int4", RECIPE)
        assert not (tmp_path / "int4").exists()


def test_a_source_without_weights_is_refused(tmp_path: Path, source: Path) -> None:
    (source / SINGLE_FILE).unlink()
    with refused(CheckpointError, source, "has neither"):
        quantize(source, tmp_path / "int4", RECIPE)


def test_a_source_cut_short_is_refused(tmp_path: Path, source: Path) -> None:
    path = source / SINGLE_FILE
    os.truncate(path, path.stat().st_size - 1)
    with refused(CheckpointError, path):
        quantize(source, tmp_path / "int4", RECIPE)
    assert not (tmp_path / "int4").exists()


def test_a_damaged_int4_directory_is_refused_by_load(tmp_path: Path, source: Path) -> None:
    quantize(source, tmp_path / "int4", RECIPE)
    module = O_PROJ.removesuffix(".weight")

    def damaged(change: Callable[[Tensors], None], *words: object) -> None:
        place = Path(shutil.copytree(tmp_path / "int4", tmp_path / "damaged"))
        with_tensors(place, change)
        with refused(CheckpointError, *words):
            load_model(place)
        shutil.rmtree(place)

    scale = f"{module}.weight_scale"
    damaged(lambda t: t[scale].view(-1)[:1].fill_(float("nan")), scale, "NaN or infinite scale")
    damaged(lambda t: t.pop(scale), module)
    damaged(lambda t: t.pop(f"{module}.weight_packed"), module)
    damaged(lambda t: t.update({scale: t[scale][:, :1].clone()}), scale)
    damaged(lambda t: t.update({scale: t[scale].view(torch.int16)}), scale)


def test_the_advice_for_a_width_can_be_followed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_source(source, small_config(moe_intermediate_size=40))
    patterns: list[str] = []
    for number in range(3):
        try:
            quantize(source, tmp_path / f"{number}", Recipe.of(4, 32, [], patterns))
            break
        except CheckpointError as error:
            patterns.append(str(error).rpartition("--keep '")[2].rstrip("'"))
    assert patterns == ["*.mlp.experts.*", "*.shared_experts.down_proj"]
    load_model(tmp_path / "2")
