"""Every format of compressed-tensors against that library's own compressors."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm5.errors import CheckpointError
from glm5.formats import CompressedTensors, Format
from glm5.formats.bits import words
from tests.checkpoint.checkpoint_fixture import bits, refused
from tests.formats.format_fixture import MODULE, NAME, form, generator, pack, read_back, stored

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
)
from compressed_tensors.quantization.utils import calculate_qparams

few = settings(max_examples=40, deadline=None)
floats = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
seeds = st.integers(0, 2**32)


def scheme(format: str, **weights: Any) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=weights, format=format)


def config_of(*schemes: QuantizationScheme, **changes: Any) -> Format:
    """Our format for the config.json that the library writes for these schemes."""
    groups = {f"group_{number}": scheme for number, scheme in enumerate(schemes)}
    written = QuantizationConfig(config_groups=groups, format=schemes[0].format).model_dump(mode="json")
    return form(**{**json.loads(json.dumps(written)), **changes})


def compressed(scheme: QuantizationScheme, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """What the library stores for this weight, and what it reads back from that."""
    compressor: Any = BaseCompressor.get_value_from_registry(scheme.format)
    tensors = compressor.compress(state, scheme)
    return tensors, compressor.decompress(dict(tensors), scheme)["weight"]


def with_scales(weight: Tensor, scheme: QuantizationScheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weight with scales and zero points from the library's own minimum and maximum."""
    args = scheme.weights
    assert args is not None
    block = args.block_structure or [
        {"tensor": weight.shape[0]}.get(args.strategy, 1),
        args.group_size if args.strategy == "group" else weight.shape[1],
    ]
    down, across = -(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1])
    lows, highs = torch.zeros(down, across), torch.zeros(down, across)
    for row in range(down):
        for column in range(across):
            part = weight[row * block[0] : (row + 1) * block[0], column * block[1] : (column + 1) * block[1]]
            lows[row, column], highs[row, column] = part.min(), part.max()
    scale, zero = calculate_qparams(lows.to(dtype), highs.to(dtype), args)
    if args.strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    return {"weight": weight.to(dtype), "weight_scale": scale, "weight_zero_point": zero}


@st.composite
def integer_schemes(draw: st.DrawFn, format: str, widths: st.SearchStrategy[int]) -> Any:
    """(scheme, rows, columns) of every strategy; groups divide the columns, as the library asks."""
    kind = draw(st.sampled_from(["tensor", "channel", "group", "block"]))
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    more: dict[str, Any] = {}
    if kind == "group":
        more = {"group_size": draw(st.sampled_from([1, 3, 8, 20, 32]))}
        columns = more["group_size"] * draw(st.integers(1, 4))
    if kind == "block":
        more = {"block_structure": [draw(st.integers(1, 9)), draw(st.integers(1, 9))]}
    # The library cannot itself read 4-bit zero points of up to 8 rows (one word a column).
    symmetric = draw(st.booleans()) or rows <= 8
    weights = {"num_bits": draw(widths), "type": "int", "strategy": kind, "symmetric": symmetric, **more}
    return scheme(format, **weights), rows, columns


@few
@given(integer_schemes("pack-quantized", st.integers(2, 8)), floats, seeds)
def test_packed_integers_are_those_of_the_library(case: Any, dtype: torch.dtype, seed: int) -> None:
    scheme, rows, columns = case
    weight = torch.randn(rows, columns, generator=generator(seed)) + 0.5
    tensors, wanted = compressed(scheme, with_scales(weight, scheme, dtype))
    found = read_back(config_of(scheme), tensors, unused=("input_global_scale",))
    # The library multiplies in the scale's dtype; a code times a 16-bit scale is exact in fp32.
    assert torch.equal(found.to(dtype), wanted)


@few
@given(
    st.sampled_from(["int-quantized", "naive-quantized"]).flatmap(
        lambda format: integer_schemes(format, st.sampled_from([4, 8]))
    ),
    floats,
    seeds,
)
def test_plain_integers_are_those_of_the_library(case: Any, dtype: torch.dtype, seed: int) -> None:
    scheme, rows, columns = case
    weight = torch.randn(rows, columns, generator=generator(seed)) - 0.5
    tensors, wanted = compressed(scheme, with_scales(weight, scheme, dtype))
    assert tensors["weight"].dtype == torch.int8
    found = read_back(config_of(scheme), tensors, unused=("input_scale", "input_zero_point"))
    assert torch.equal(found.to(dtype), wanted)


@few
@given(
    st.sampled_from(["float-quantized", "naive-quantized"]),
    st.sampled_from([("tensor", {}), ("channel", {}), ("block", {"block_structure": [128, 128]}),
                     ("block", {"block_structure": [5, 16]}), ("group", {"group_size": 16})]),
    st.integers(1, 140), st.integers(1, 9), seeds,
)  # fmt: skip
def test_fp8_is_that_of_the_library(format: str, kind: Any, rows: int, columns: int, seed: int) -> None:
    args = scheme(format, num_bits=8, type="float", strategy=kind[0], **kind[1])
    weight = torch.randn(rows, columns * 16, generator=generator(seed))
    tensors, wanted = compressed(args, with_scales(weight, args, torch.float32))
    assert tensors["weight"].dtype == torch.float8_e4m3fn
    assert torch.equal(read_back(config_of(args), tensors, unused=("input_scale",)), wanted)


@few
@given(st.integers(1, 20), st.integers(1, 6), st.floats(0.01, 1e4), seeds)
def test_nvfp4_is_that_of_the_library(rows: int, groups: int, whole: float, seed: int) -> None:
    args = scheme(
        "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16,
        scale_dtype="torch.float8_e4m3fn",
    )  # fmt: skip
    weight = torch.randn(rows, groups * 16, generator=generator(seed))
    peaks = weight.unflatten(1, (groups, 16)).abs().amax(2) / 6
    scale = (peaks * whole).clamp(1e-2, 448).to(torch.float8_e4m3fn).to(torch.float32)
    state = {"weight": weight, "weight_scale": scale, "weight_global_scale": torch.tensor([whole])}
    tensors, wanted = compressed(args, state)
    found = read_back(config_of(args), tensors, unused=("input_global_scale",))
    assert torch.equal(found.bfloat16(), wanted)
    if 0.1 < whole < 100:  # the global scale divides
        assert (found - weight).abs().max() < 1.0


@few
@given(st.integers(1, 20), st.integers(1, 4), st.integers(-20, 20), seeds)
def test_mxfp4_is_that_of_the_library(rows: int, groups: int, power: int, seed: int) -> None:
    args = scheme(
        "mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32,
        scale_dtype="torch.uint8",
    )  # fmt: skip
    weight = torch.randn(rows, groups * 32, generator=generator(seed)) * 2.0**power
    peaks = weight.unflatten(1, (groups, 32)).abs().amax(2)
    state = {"weight": weight, "weight_scale": torch.exp2((peaks / 6).log2().ceil())}
    tensors, wanted = compressed(args, state)
    assert tensors["weight_scale"].dtype == torch.uint8
    assert torch.equal(read_back(config_of(args), tensors).bfloat16(), wanted)


@few
@given(st.integers(1, 20), st.integers(1, 4), seeds)
def test_mxfp8_is_that_of_the_library(rows: int, groups: int, seed: int) -> None:
    args = scheme(
        "mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32,
        scale_dtype="torch.uint8",
    )  # fmt: skip
    weight = torch.randn(rows, groups * 32, generator=generator(seed))
    peaks = weight.unflatten(1, (groups, 32)).abs().amax(2)
    tensors, wanted = compressed(
        args, {"weight": weight, "weight_scale": torch.exp2((peaks / 448).log2().ceil())}
    )
    for dtype in (torch.uint8, torch.float8_e8m0fnu):
        stored = tensors | {"weight_scale": tensors["weight_scale"].view(dtype)}
        assert torch.equal(read_back(config_of(args), stored).bfloat16(), wanted)


# --- what the library no longer writes, against the definition --------------------------------------


@few
@given(st.integers(2, 8), st.integers(1, 9), st.integers(1, 60), st.integers(1, 25), st.booleans(), seeds)
def test_part_full_groups_and_any_order_of_columns(
    width: int, rows: int, columns: int, size: int, ordered: bool, seed: int
) -> None:
    draw, groups = generator(seed), -(-columns // size)
    codes = torch.randint(0, 2**width, (rows, columns), generator=draw)
    scale = torch.rand(rows, groups, generator=draw) + 0.1
    order = torch.arange(columns) // size if ordered else torch.randint(0, groups, (columns,), generator=draw)
    tensors = {
        "weight_packed": torch.tensor([pack(row, width) for row in codes.tolist()], dtype=torch.int32),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not ordered:
        tensors["weight_g_idx"] = order.int()
    args = {"num_bits": width, "type": "int", "strategy": "group", "group_size": size, "actorder": "group"}
    group = {"targets": ["Linear"], "weights": args}
    format = form(quant_method="compressed-tensors", format="pack-quantized", config_groups={"g": group})
    if columns < groups * size and words(columns, width) == words(groups * size, width):
        # The headers look like a whole last group. No writer leaves a few columns of a word out.
        with stored(tensors) as index, refused(CheckpointError, MODULE):
            format.read(NAME, index)
        return
    wanted = (codes - 2 ** (width - 1)).float() * scale[:, order]
    assert torch.equal(read_back(format, tensors), wanted)


def packed_int4(rows: int = 4, columns: int = 16) -> dict[str, Tensor]:
    return {
        "weight_packed": torch.zeros(rows, columns // 8, dtype=torch.int32),
        "weight_scale": torch.ones(rows, columns // 8),
        "weight_shape": torch.tensor([rows, columns]),
    }


def int4(**changes: Any) -> CompressedTensors:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, **changes}
    groups = {"experts": {"targets": ["re:.*experts.*"], "weights": weights}}
    found = form(quant_method="compressed-tensors", format="pack-quantized", config_groups=groups)
    assert isinstance(found, CompressedTensors)
    return found


def test_an_order_that_was_never_used_and_zero_points_of_nought_are_harmless() -> None:
    tensors = packed_int4()
    wanted = torch.full((4, 16), -8.0)
    assert torch.equal(read_back(int4(), tensors), wanted)
    tensors["weight_g_idx"] = torch.full((16,), -1, dtype=torch.int32)
    tensors["weight_zero_point"] = torch.zeros(4, 2, dtype=torch.int8)
    assert torch.equal(read_back(int4(), tensors), wanted)
    del tensors["weight_shape"]  # here the scales tell the columns
    assert torch.equal(read_back(int4(), tensors), wanted)


def test_other_weights_are_left_to_others() -> None:
    with stored({"weight": torch.ones(2, 2), "up": torch.ones(2, 2)}) as index:
        assert int4().stored_names(NAME, index) is None
        assert int4().stored_names(f"{MODULE}.up", index) is None
        assert int4().stored_names("model.norm.weight", index) is None


def test_a_weight_without_rows_or_columns_is_read() -> None:
    for rows, columns in ((0, 16), (4, 0), (0, 0)):
        found = read_back(int4(), packed_int4(rows, columns))
        assert found.shape == (rows, columns)


def test_the_group_tells_all_that_a_kernel_must_know() -> None:
    group = int4().group_of(MODULE)
    assert group is not None
    assert (group.name, group.format, group.type) == ("experts", "pack-quantized", "int")
    assert (group.bits, group.group_size, group.symmetric, group.strategy) == (4, 8, True, "group")
    assert int4().group_of("model.layers.3.self_attn.o_proj") is None


def test_a_model_of_mixed_precision_reads_each_module_its_own_way() -> None:
    experts = scheme("pack-quantized", num_bits=4, type="int", strategy="channel")
    experts.targets = ["re:.*experts.*"]
    rest = scheme("float-quantized", num_bits=8, type="float", strategy="tensor")
    format = config_of(experts, rest, format="mixed-precision", ignore=["lm_head", "re:.*mlp.gate$"])
    assert isinstance(format, CompressedTensors)
    found = {
        name: group and group.format
        for name in (MODULE, "model.layers.0.self_attn.o_proj", "model.layers.3.mlp.gate", "lm_head")
        for group in [format.group_of(name)]
    }
    assert list(found.values()) == ["pack-quantized", "float-quantized", None, None]
    weight = torch.randn(8, 24, generator=generator(1))
    tensors, wanted = compressed(experts, with_scales(weight, experts, torch.float32))
    assert torch.equal(read_back(format, tensors), wanted)


@pytest.mark.parametrize(
    ("weights", "activations", "wanted"),
    [
        ({"num_bits": 4, "type": "int", "group_size": 32}, None, "pack-quantized"),
        ({"num_bits": 8, "type": "int"}, {"num_bits": 8, "type": "int"}, "int-quantized"),
        ({"num_bits": 4, "type": "int", "group_size": 32}, {"num_bits": 8, "type": "float"}, "int-quantized"),
        ({"num_bits": 8, "type": "float"}, {"num_bits": 8, "type": "float"}, "float-quantized"),
        ({"num_bits": 8, "type": "float", "group_size": -1}, None, "float-quantized"),
        ({"num_bits": 8, "type": "float", "group_size": 32, "scale_dtype": "torch.uint8"}, None,
         "mxfp8-quantized"),
        ({"num_bits": 4, "type": "float", "group_size": 32}, None, "mxfp4-pack-quantized"),
        ({"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"}, None,
         "nvfp4-pack-quantized"),
    ],
)  # fmt: skip
def test_a_group_without_a_format_gets_the_one_the_library_would_write(
    weights: Any, activations: Any, wanted: str
) -> None:
    from compressed_tensors.compressors.format import infer_module_format

    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    library = infer_module_format(torch.nn.Linear, QuantizationScheme(**group)).value
    found = form(quant_method="compressed-tensors", format="mixed-precision", config_groups={"g": group})
    assert isinstance(found, CompressedTensors)
    ours = found.group_of(MODULE)
    assert ours is not None
    same = {"naive-quantized": "float-quantized"}  # two names of one layout
    assert ours.format == wanted == same.get(library, library)


def test_bits_are_kept_from_the_lowest_up() -> None:
    """Layout by hand: 3-bit codes 0..7 twice and a half, across a border of words."""
    tensors = {
        "weight_packed": torch.tensor([pack([*range(8), *range(8), *range(4)], 3)], dtype=torch.int32),
        "weight_scale": torch.ones(1, 1),
        "weight_shape": torch.tensor([1, 20]),
    }
    found = read_back(int4(num_bits=3, strategy="channel", group_size=None), tensors)
    assert torch.equal(bits(found), bits((torch.arange(20) % 8 - 4.0).reshape(1, 20)))
