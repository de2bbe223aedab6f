"""Hostile `quantization_config`s: a Format or one line that names the file, the key and the value."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5.errors import CheckpointError
from glm5.formats import CompressedTensors, Format, format_of
from tests.checkpoint.checkpoint_fixture import refused
from tests.formats.format_fixture import CONFIG, MODULE, form

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
FP8 = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
GOOD: dict[str, dict[str, Any]] = {
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "ignore": ["lm_head", "re:.*gate$"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {"config_groups": {}},
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["re:.*experts.*"], "weights": INT4, "format": "pack-quantized"},
            "group_1": {
                "targets": ["Linear"],
                "weights": FP8,
                "input_activations": {"num_bits": 8, "type": "float", "dynamic": True},
                "format": None,
            },
            "group_2": {"targets": ["re:.*k_proj"], "weights": None},
        },
    },
    "fp8": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"],
    },
    "gptq": {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": True,
        "checkpoint_format": "gptq", "dynamic": {"-:.*attn.*": {}, "+:.*experts.*": {"bits": 8}},
        "meta": {"quantizer": ["gptqmodel:5.0"]},
    },
    "awq": {
        "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "GEMM",
        "modules_to_not_convert": ["visual"],
    },
    "modelopt": {
        "quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "ignore": ["lm_head"],
        "quantized_layers": {"a": {"quant_algo": "NVFP4", "group_size": 16}, "b": {"quant_algo": "FP8"}},
    },
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}  # fmt: skip


@pytest.mark.parametrize("method", GOOD)
def test_what_published_models_say_is_understood(method: str) -> None:
    assert isinstance(form(**GOOD[method]), Format)


def changed(method: str, path: str, value: Any) -> dict[str, Any]:
    """A good config with one value replaced."""
    config = copy.deepcopy(GOOD[method])
    *parents, key = path.split("/")
    place = config
    for parent in parents:
        place = place[parent]
    place[key] = value
    return config


HUGE, DEEP = 10**5000, json.loads("[" * 90 + "]" * 90)
NINES = "128x" + "9" * 5000
SPARSE = {"format": "sparse-24-bitmask"}
FIRST, WEIGHTS = "config_groups/group_0", "config_groups/group_0/weights"
BAD: dict[str, dict[str, list[Any]]] = {
    "fp8": {
        "quant_method": ["bitsandbytes", "", 8, ["fp8"], {}, True, HUGE, "a\nb"],
        "fmt": ["e5m2", 4, []],
        "weight_block_size": [[128], [128, 128, 1], [0, 1], [-1, 1], [True, 1], [1.0, 1], "128x128", 128,
                              [HUGE, 1], [[1], 1], [1 << 40, 1]],
    },
    "compressed-tensors": {
        "config_groups": [None, {}, [], "W4A16", 4, {"": 1}, {"W4A16": ["Linear"]}],
        "format": ["marlin-24", "sparse-bitmask", "mxfp6-pack-quantized", 3, []],
        "ignore": ["Linear", [1], {"a": 1}, [None], 7, [["re:a"]]],
        "sparsity_config": [SPARSE, {"global_sparsity": 0.5}, [1], 4],
        "transform_config": [SPARSE, {"config_groups": {"R1": {}}}, [1], 4],
        FIRST: [[], "a", 4, True, DEEP],
        f"{FIRST}/format": ["mixed-precision", "marlin-24", [], 1],
        f"{FIRST}/targets": ["Linear", [1], {"a": 1}, [None], 7, [["re:a"]]],
        WEIGHTS: [[], "int4", 4, DEEP],
        f"{WEIGHTS}/num_bits": [1, 9, 0, -4, 4.0, "4", True, HUGE, -HUGE, [4]],
        f"{WEIGHTS}/type": ["float", "uint", 4, ["int"]],
        f"{WEIGHTS}/strategy": ["token", "tensor_group", "attn_head", 4, []],
        f"{WEIGHTS}/group_size": [None, 0, -1, -2, 32.0, "32", True, HUGE, 1 << 40],
        f"{WEIGHTS}/symmetric": [1, "true", []],
        "config_groups/group_1/weights/block_structure": [
            None, [128], [0, 128], "128", "axb", NINES, "1x2x3", [HUGE, 1], {}, [True, True],
        ],
        "config_groups/group_1/weights/symmetric": [False],
    },
    "gptq": {
        "bits": [None, 1, 5, 6, 7, 16, 4.0, "4", True, HUGE],
        "group_size": [0, -2, 128.0, True, HUGE],
        "checkpoint_format": ["marlin", "bitblas", "gptq_p", 2],
        "sym": [1, "yes"],
        "dynamic": [[], "a", {"+:a": 4}, {"(": {}}, {"a": {"bits": 5}}, {"a": {"group_size": 0}}],
    },
    "awq": {
        "bits": [3, 8, "4"],
        "version": ["gemv", "gemv_fast", "marlin", "llm-awq", 1],
        "zero_point": [0, "no"],
        "modules_to_not_convert": ["lm_head", [1]],
    },
    "modelopt": {
        "quant_algo": [None, "NVFP4_AWQ", "W8A8_SQ_PER_CHANNEL", "INT4_AWQ", 4, []],
        "quantized_layers": [[], 4, {"a": 4}, {"a": {}}, {"a": {"quant_algo": "W4A8_AWQ"}},
                             {"a": {"quant_algo": "NVFP4", "group_size": 32}}],
    },
}  # fmt: skip
BAD_VALUES = [
    pytest.param(method, path, value, id=f"{method} {path} {number}")
    for method, cases in BAD.items()
    for path, values in cases.items()
    for number, value in enumerate(values)
]


@pytest.mark.parametrize(("method", "path", "value"), BAD_VALUES)
def test_a_bad_value_is_refused_by_file_and_key(method: str, path: str, value: Any) -> None:
    with refused(CheckpointError, CONFIG, "quantization_config", path.split("/")[0]):
        form(**changed(method, path, value))


def test_what_was_found_is_said() -> None:
    with refused(CheckpointError, "quantization_config.bits is 5; glm5 reads 2, 3, 4, 8"):
        form(**changed("gptq", "bits", 5))
    with refused(CheckpointError, "quantization_config.quant_method is 'exl3'; glm5 reads fp8, compressed-"):
        form(quant_method="exl3")
    with refused(
        CheckpointError, "config_groups.group_0.weights.num_bits is 1; glm5 reads a whole number from 2"
    ):
        form(**changed("compressed-tensors", f"{WEIGHTS}/num_bits", 1))
    with refused(CheckpointError, "quantization_config is [1], not an object"):
        format_of([1], CONFIG)  # type: ignore[arg-type]


words = ["re:(", "re:a{9999999}", "int", "float", "group", "block", "pack-quantized", "\ud800"]
numbers = st.booleans() | st.floats() | st.integers() | st.booleans().map(lambda _: HUGE)
json_values = st.recursive(
    st.none() | numbers | st.text(max_size=8) | st.sampled_from(words),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def paths(config: Any, base: str = "") -> list[str]:
    if not isinstance(config, dict):
        return []
    return [found for key, value in config.items() for found in (base + key, *paths(value, f"{base}{key}/"))]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_random_values_give_a_format_or_a_typed_error(data: st.DataObject) -> None:
    method = data.draw(st.sampled_from(sorted(GOOD)))
    config = changed(method, data.draw(st.sampled_from(paths(GOOD[method]))), data.draw(json_values))
    try:
        format = format_of(config, CONFIG)
    except CheckpointError:
        with refused(CheckpointError, f"{CONFIG}: quantization_config"):
            format_of(config, CONFIG)
        return
    if isinstance(format, CompressedTensors):
        format.group_of(MODULE)
