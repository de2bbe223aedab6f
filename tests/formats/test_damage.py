"""Damaged weights: each is refused in one line that names the file and the tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm5.disk.safetensors_file import SafetensorsFile
from glm5.errors import CheckpointError
from glm5.formats import Format
from tests.checkpoint.checkpoint_fixture import refused
from tests.formats.format_fixture import MODULE, NAME, form, stored

NAN, INF, BIG = float("nan"), float("inf"), 3e38
FP8, U8, I8, I32, I64 = torch.float8_e4m3fn, torch.uint8, torch.int8, torch.int32, torch.int64


def group(kind: str, format: str, **weights: Any) -> Format:
    entry = {"targets": ["Linear"], "weights": {"type": kind, **weights}, "format": format}
    return form(quant_method="compressed-tensors", format="mixed-precision", config_groups={"g": entry})


# Each format with a weight of 16 x 64 that it reads.
Case = tuple[Format, dict[str, Tensor]]
CASES: dict[str, Case] = {
    "packed": (
        group("int", "pack-quantized", num_bits=4, strategy="group", group_size=16, symmetric=False),
        {
            "weight_packed": torch.zeros(16, 8, dtype=I32),
            "weight_scale": torch.ones(16, 4),
            "weight_zero_point": torch.zeros(2, 4, dtype=I32),
            "weight_shape": torch.tensor([16, 64]),
            "weight_g_idx": torch.arange(64, dtype=I32) // 16,
        },
    ),
    "packed channels": (
        group("int", "pack-quantized", num_bits=3, strategy="channel"),
        {
            "weight_packed": torch.zeros(16, 6, dtype=I32),
            "weight_scale": torch.ones(16, 1),
            "weight_shape": torch.tensor([16, 64]),
        },
    ),
    "int8": (
        group("int", "int-quantized", num_bits=4, strategy="tensor", symmetric=False),
        {
            "weight": torch.zeros(16, 64, dtype=I8),
            "weight_scale": torch.ones(1),
            "weight_zero_point": torch.zeros(1, dtype=I8),
        },
    ),
    "fp8": (
        group("float", "float-quantized", num_bits=8, strategy="block", block_structure=[8, 32]),
        {"weight": torch.zeros(16, 64).to(FP8), "weight_scale": torch.ones(2, 2)},
    ),
    "nvfp4": (
        group("float", "nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16),
        {
            "weight_packed": torch.full((16, 32), 119, dtype=U8),
            "weight_scale": torch.ones(16, 4).to(FP8),
            "weight_global_scale": torch.ones(1),
        },
    ),
    "mxfp8": (
        group("float", "mxfp8-quantized", num_bits=8, strategy="group", group_size=32),
        {"weight": torch.zeros(16, 64).to(FP8), "weight_scale": torch.zeros(16, 2, dtype=U8)},
    ),
    "mxfp4": (
        form(quant_method="mxfp4"),
        {"weight_blocks": torch.zeros(16, 2, 16, dtype=U8), "weight_scales": torch.zeros(16, 2, dtype=U8)},
    ),
    "modelopt": (
        form(quant_method="modelopt", quant_algo="NVFP4"),
        {
            "weight": torch.zeros(16, 32, dtype=U8),
            "weight_scale": torch.ones(16, 4).to(FP8),
            "weight_scale_2": torch.ones(()),
        },
    ),
    "modelopt fp8": (
        form(quant_method="modelopt", quant_algo="FP8"),
        {"weight": torch.zeros(16, 64).to(FP8), "weight_scale": torch.ones(())},
    ),
    "block fp8": (
        form(quant_method="fp8", weight_block_size=[8, 32]),
        {"weight": torch.zeros(16, 64).to(FP8), "weight_scale_inv": torch.ones(2, 2)},
    ),
    "gptq": (
        form(quant_method="gptq", bits=4, group_size=16, sym=False),
        {
            "qweight": torch.zeros(8, 16, dtype=I32),
            "qzeros": torch.zeros(4, 2, dtype=I32),
            "scales": torch.ones(4, 16).half(),
            "g_idx": torch.arange(64, dtype=I32) // 16,
        },
    ),
    "awq": (
        form(quant_method="awq", bits=4, group_size=16, version="gemm"),
        {
            "qweight": torch.zeros(64, 2, dtype=I32),
            "qzeros": torch.zeros(4, 2, dtype=I32),
            "scales": torch.ones(4, 16).half(),
        },
    ),
}
ONE_SCALE = {"int8", "modelopt fp8"}
OPTIONAL = {"weight_shape", "weight_g_idx", "g_idx"}


@pytest.mark.parametrize("case", CASES)
def test_the_undamaged_weight_is_read(case: str) -> None:
    format, tensors = CASES[case]
    with stored(tensors) as index:
        assert format.shape(NAME, index) == (16, 64)
        assert format.read(NAME, index).isfinite().all()
        with pytest.raises(ValueError, match="step"):
            format.read(NAME, index, slice(None, None, 2))
        with refused(CheckpointError, index.directory, "model.layers.9.other.weight is not stored"):
            format.shape("model.layers.9.other.weight", index)


def altered(tensor: Tensor) -> list[Tensor]:
    """The tensor with another shape or dtype."""
    longer = torch.zeros(tensor.shape[0] + 1 if tensor.dim() else 2, *tensor.shape[1:]).to(tensor.dtype)
    wider = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 3 if tensor.dim() else 2).to(tensor.dtype)
    nested, empty = torch.zeros((1, 1, 1, *tensor.shape)), torch.zeros(0)
    others = [tensor.to(torch.int16), torch.zeros(tensor.shape).to(torch.float8_e5m2)]
    return [longer, wider, nested.to(tensor.dtype), empty.to(tensor.dtype), *others]


PLACES = [(case, suffix) for case, (_, tensors) in CASES.items() for suffix in tensors]


@pytest.mark.parametrize(("case", "suffix"), PLACES)
def test_wrong_headers_are_refused_before_any_weight_is_read(
    case: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    format, tensors = CASES[case]
    read = SafetensorsFile.read_into

    def only_the_shape(self: SafetensorsFile, name: str, target: Tensor) -> None:
        assert name == f"{MODULE}.weight_shape", f"{name} is read before all headers are checked"
        read(self, name, target)

    monkeypatch.setattr(SafetensorsFile, "read_into", only_the_shape)
    for other in altered(tensors[suffix]):
        with stored({**tensors, suffix: other}) as index:
            names = format.stored_names(NAME, index)
            if names is None:  # another dtype makes it another kind of weight
                assert suffix == "weight"
                continue
            if suffix == "weight_shape" and case == "packed":
                continue  # not needed here: the values are compared when the weight is read
            if suffix == "weight" and case in ONE_SCALE and other.dtype == tensors[suffix].dtype:
                assert other.dim() != 2 or format.shape(NAME, index) == other.shape
                continue  # with one scale for all, any matrix will do
            with refused(CheckpointError, index.directory, MODULE):
                format.shape(NAME, index)
    if suffix in OPTIONAL or suffix == next(iter(tensors)):
        return
    with stored({name: tensor for name, tensor in tensors.items() if name != suffix}) as index:  # noqa: SIM117
        with refused(CheckpointError, index.directory, f"{MODULE}.{suffix} is missing"):
            format.shape(NAME, index)


def put(*place: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone().float() if tensor.dtype == FP8 else tensor.clone()
        changed[place] = value
        return changed.to(tensor.dtype)

    return change


VALUES: list[tuple[str, str, Callable[[Tensor], Tensor], str]] = [
    *[(case, suffix, put(*place, value=bad), "NaN")
      for case, suffix, place in [
          ("packed", "weight_scale", (3, 2)), ("packed channels", "weight_scale", (15, 0)),
          ("int8", "weight_scale", (0,)), ("fp8", "weight_scale", (1, 1)),
          ("nvfp4", "weight_global_scale", (0,)), ("modelopt", "weight_scale_2", ()),
          ("modelopt fp8", "weight_scale", ()), ("block fp8", "weight_scale_inv", (0, 1)),
          ("gptq", "scales", (3, 3)), ("awq", "scales", (0, 15))]
      for bad in (NAN, INF, -INF, *([BIG] if suffix != "scales" and "global" not in suffix else []))],
    ("nvfp4", "weight_global_scale", put(0, value=0.0), "NaN"),
    ("nvfp4", "weight_global_scale", put(0, value=1e-45), "NaN"),
    ("nvfp4", "weight_scale", put(2, 2, value=NAN), "NaN"),
    ("modelopt", "weight_scale", put(2, 2, value=NAN), "NaN"),
    *[(case, suffix, put(4, 1, value=bad), "NaN")
      for case, suffix in [("mxfp8", "weight_scale"), ("mxfp4", "weight_scales")] for bad in (255, 254)],
    *[(case, "weight", put(5, 63, value=NAN), "NaN")
      for case in ("fp8", "mxfp8", "modelopt fp8", "block fp8")],
    *[(case, suffix, put(63, value=bad), "4 groups")
      for case, suffix in [("packed", "weight_g_idx"), ("gptq", "g_idx")] for bad in (4, -1, -(2**31))],
    *[("int8", suffix, put(0, *more, value=bad), "-8..7")
      for suffix, more in [("weight", (0,)), ("weight_zero_point", ())] for bad in (8, -9, 127)],
    *[(case, "weight_shape", put(place, value=bad), "says")
      for case, place, bad in [
          ("packed", 0, 17), ("packed", 1, 63), ("packed", 1, -64), ("packed", 1, 2**62),
          ("packed channels", 0, 0), ("packed channels", 1, 65), ("packed channels", 1, -1),
          ("packed channels", 1, 2**62), ("packed channels", 1, 53)]],
]  # fmt: skip


@pytest.mark.parametrize(("case", "suffix", "change", "word"), VALUES)
def test_wrong_values_are_refused_by_file_and_tensor(
    case: str, suffix: str, change: Callable[[Tensor], Tensor], word: str
) -> None:
    format, tensors = CASES[case]
    with stored({**tensors, suffix: change(tensors[suffix])}) as index:
        for rows in (None, slice(0, 1)):  # wherever the damage is
            with refused(CheckpointError, index.directory / "model.safetensors", f"{MODULE}.{suffix}", word):
                format.read(NAME, index, rows)


def test_zero_points_that_config_denies_are_refused() -> None:
    format, tensors = CASES["packed channels"]
    with stored({**tensors, "weight_zero_point": torch.ones(2, 1, dtype=I32)}) as index:  # noqa: SIM117
        with refused(CheckpointError, f"{MODULE}.weight_zero_point", "symmetric"):
            format.read(NAME, index)


@pytest.mark.parametrize("case", ["packed", "nvfp4", "mxfp4", "gptq", "awq"])
def test_a_weight_that_is_stored_twice_is_refused(case: str) -> None:
    format, tensors = CASES[case]
    with stored({**tensors, "weight": torch.zeros(16, 64)}) as index:
        names = format.stored_names(NAME, index)
        assert names is not None and NAME in names
        with refused(CheckpointError, "model.safetensors", NAME, "a second time"):
            format.shape(NAME, index)


def test_a_quantized_weight_that_no_group_covers_is_refused() -> None:
    weights = {"num_bits": 4, "type": "int", "strategy": "channel"}
    groups = {"g": {"targets": ["re:.*attn.*"], "weights": weights}}
    format = form(quant_method="compressed-tensors", format="pack-quantized", config_groups=groups)
    for case, suffix in (("packed channels", "weight_packed"), ("fp8", "weight")):
        with stored(CASES[case][1]) as index:  # noqa: SIM117
            with refused(CheckpointError, f"{MODULE}.{suffix}", "config.json", "no group"):
                format.shape(NAME, index)


def test_extents_past_any_layer_are_refused() -> None:
    """A tensor without elements needs no bytes for them."""
    for case, lies in {
        "mxfp4": {"weight_blocks": (0, 1 << 57, 16), "weight_scales": (0, 1 << 57)},
        "modelopt": {"weight": (1 << 61, 0), "weight_scale": (1 << 61, 0)},
        "block fp8": {"weight": (0, 1 << 60), "weight_scale_inv": (0, 1 << 55)},
    }.items():
        format, tensors = CASES[case]
        hollow = {suffix: torch.empty(shape, dtype=tensors[suffix].dtype) for suffix, shape in lies.items()}
        with stored({**tensors, **hollow}) as index, refused(CheckpointError, NAME, "larger than any layer"):
            format.read(NAME, index)


def test_a_shape_below_nought_is_refused() -> None:
    format, tensors = CASES["packed channels"]
    hollow = {"weight_packed": torch.zeros(16, 0, dtype=I32), "weight_shape": torch.tensor([16, -1])}
    with stored({**tensors, **hollow}) as index, refused(CheckpointError, f"{MODULE}.weight_shape", "-1"):
        format.shape(NAME, index)


DTYPES = [torch.float32, torch.bfloat16, FP8, U8, I8, I32, I64]
shapes = st.lists(st.integers(0, 9) | st.sampled_from([16, 32, 64]), max_size=4).map(tuple)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_header_is_read_or_refused(data: st.DataObject) -> None:
    format, tensors = CASES[data.draw(st.sampled_from(sorted(CASES)))]
    changed = dict(tensors)
    for suffix in data.draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=3)):
        shape, dtype = data.draw(shapes), data.draw(st.sampled_from([tensors[suffix].dtype, *DTYPES]))
        if data.draw(st.integers(0, 5)) == 0:
            changed.pop(suffix, None)
        else:
            changed[suffix] = torch.randint(0, 100, shape).to(dtype)
    with stored(changed) as index:
        if format.stored_names(NAME, index) is None:
            return
        try:
            weight = format.read(NAME, index)
        except CheckpointError:
            with refused(CheckpointError, index.directory, MODULE):
                format.read(NAME, index)
            return
        assert weight.isfinite().all() and weight.shape == format.shape(NAME, index)
