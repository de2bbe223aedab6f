"""Every block type is read in bands of blocks, and gives back what was stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5.checkpoint.gguf.blocks import TYPES, BlockType
from tests.checkpoint.gguf.gguf_fixture import gguf

DECODED = {number: kind for number, kind in TYPES.items() if kind.is_decoded}
QUANTIZERS = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"]
# The largest error a type may make on normally distributed weights, of their standard deviation.
WORST = {"F16": 2e-3, "BF16": 1e-2, "Q8_0": 0.02, "Q5_1": 0.15, "Q5_0": 0.2, "Q4_1": 0.3, "Q4_0": 0.5,
         "MXFP4": 1.1}  # fmt: skip


def decode(kind: BlockType, raw: np.ndarray) -> np.ndarray:
    return kind.decode(torch.from_numpy(raw)).reshape(-1).numpy()


def reference(number: int, raw: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(raw.reshape(1, -1), gguf.GGMLQuantizationType(number))
    return np.ascontiguousarray(values).reshape(-1)


def assert_same_bits(found: np.ndarray, wanted: np.ndarray) -> None:
    """Bit for bit, except that any NaN is a NaN."""
    assert found.dtype == wanted.dtype == np.float32
    nan = np.isnan(wanted)
    assert np.array_equal(np.isnan(found), nan)
    assert np.array_equal(found[~nan].view(np.uint32), wanted[~nan].view(np.uint32))


@pytest.mark.parametrize("number", DECODED, ids=lambda number: TYPES[number].name)
@settings(deadline=None, max_examples=25)
@given(count=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def test_random_blocks_decode_as_the_reference_does(number: int, count: int, seed: int) -> None:
    """Random bytes are valid blocks of every type; scales may be NaN or infinite."""
    kind = TYPES[number]
    raw = np.random.default_rng(seed).integers(0, 256, (count, kind.bytes), dtype=np.uint8)
    assert_same_bits(decode(kind, raw), reference(number, raw))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantized_weights_come_back_close(name: str) -> None:
    number = gguf.GGMLQuantizationType[name].value
    weights = np.random.default_rng(0).standard_normal((7, 96)).astype(np.float32)
    raw = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[name]).view(np.uint8)
    raw = raw.reshape(-1, TYPES[number].bytes)

    found = decode(TYPES[number], raw)

    assert_same_bits(found, reference(number, raw))
    assert np.abs(found - weights.reshape(-1)).max() < WORST[name]


def test_the_types_of_published_glm_files_are_decoded() -> None:
    for name in (
        "IQ1_S",
        "IQ1_M",
        "IQ2_XXS",
        "IQ2_XS",
        "IQ2_S",
        "IQ3_XXS",
        "IQ3_S",
        "IQ4_XS",
        "Q4_K",
        "MXFP4",
    ):
        assert name in {kind.name for kind in DECODED.values()}


def test_sizes_are_those_of_the_format() -> None:
    known = {number.value: number for number in gguf.GGMLQuantizationType}
    shared = [number for number in TYPES if number in known and number != 9]  # Q8_1: gguf 0.19 has 40, C 36
    assert len(shared) >= 30
    for number in shared:
        kind = TYPES[number]
        assert kind.name == known[number].name
        assert (kind.elements, kind.bytes) == gguf.GGML_QUANT_SIZES[known[number]]
