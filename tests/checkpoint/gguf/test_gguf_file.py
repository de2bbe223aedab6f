"""Whole files: metadata, shapes, rows, experts, split models; written by the `gguf` package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5.checkpoint.gguf import GgufFile, file
from glm5.errors import CheckpointError
from tests.checkpoint.checkpoint_fixture import refused
from tests.checkpoint.gguf.gguf_fixture import ARRAY, STRING, U8, U32, add_tensor, finish, gguf, key, raw_file
from tests.checkpoint.gguf.gguf_fixture import tensor as entry
from tests.checkpoint.gguf.gguf_fixture import text as stored_text

MATRIX = np.random.default_rng(0).standard_normal((7, 64)).astype(np.float32)
BANK = np.random.default_rng(1).standard_normal((5, 3, 96)).astype(np.float32)


def written(path: Path, kind: str = "F32", **options: Any) -> Path:
    """A file with a vector, a matrix of 7 rows and a bank of 5 experts."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    add_tensor(writer, "vector", np.arange(5, dtype=np.float32), kind)
    add_tensor(writer, "matrix", MATRIX, kind)
    add_tensor(writer, "bank", BANK, kind)
    finish(writer)
    return path


@pytest.fixture(scope="module", params=["F32", "F16", "BF16", "Q8_0", "Q5_1"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[GgufFile, Any]:
    """A file, and its tensors as the `gguf` package reads them."""
    path = written(tmp_path_factory.mktemp("file") / "a.gguf", request.param)
    tensors = {
        t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32))
        for t in gguf.GGUFReader(path).tensors
    }
    return GgufFile(path), tensors


def test_tensors_are_those_of_the_reference(both: tuple[GgufFile, Any]) -> None:
    found, wanted = both
    assert list(found.tensors) == ["vector", "matrix", "bank"]
    for name, values in wanted.items():
        assert found.tensors[name].shape == tuple(values.shape)
        assert torch.equal(found.read(name), values)


@settings(deadline=None, max_examples=40)
@given(first=st.none() | st.integers(-9, 9), last=st.none() | st.integers(-9, 9))
def test_rows_are_a_slice(both: tuple[GgufFile, Any], first: int | None, last: int | None) -> None:
    found, wanted = both
    rows = slice(first, last)
    assert torch.equal(found.read("matrix", rows), wanted["matrix"][rows])
    assert torch.equal(found.read("bank", rows, expert=4), wanted["bank"][4][rows])


def test_an_expert_is_one_matrix(both: tuple[GgufFile, Any]) -> None:
    found, wanted = both
    for expert in range(5):
        assert torch.equal(found.read("bank", expert=expert), wanted["bank"][expert])


def test_what_a_tensor_does_not_have_is_refused(both: tuple[GgufFile, Any]) -> None:
    found, _ = both
    with refused(CheckpointError, found.path.name, "bank", "[5, 3, 96]", "no expert 5"):
        found.read("bank", expert=5)
    with refused(CheckpointError, "matrix", "no expert 0"):
        found.read("matrix", expert=0)
    with refused(CheckpointError, "vector", "rows are of matrices"):
        found.read("vector", slice(0, 1))
    with refused(CheckpointError, found.path.name, "no tensor absent"):
        found.read("absent")
    with pytest.raises(ValueError, match="without a step"):
        found.read("matrix", slice(0, 4, 2))


def test_only_the_bytes_asked_for_are_read(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf", "Q8_0")
    found = GgufFile(path)
    bank = found.tensors["bank"]
    wanted = found.read("bank", expert=1)

    os.truncate(path, bank.start + 2 * bank.num_bytes // 5)

    assert torch.equal(found.read("bank", expert=1), wanted)
    with refused(CheckpointError, path, "ends inside bank at byte", "download it again"):
        found.read("bank", expert=2)


def test_a_tensor_larger_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.gguf", "Q8_0")
    whole = {name: GgufFile(path).read(name) for name in ("vector", "matrix", "bank")}
    monkeypatch.setattr(file, "_CHUNK", 96)  # three blocks, which no size here is a multiple of
    for name, values in whole.items():
        assert torch.equal(GgufFile(path).read(name), values)


def test_metadata_of_every_type(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    wanted: dict[str, Any] = {}
    for name, value in {
        "uint8": 255, "int8": -128, "uint16": 65535, "int16": -32768, "uint32": 2**32 - 1, "int32": -(2**31),
        "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.5, "float64": 0.1, "bool": True, "string": "é𝄞",
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(name, value)
        wanted[name] = value
    arrays = {"ints": [1, 2, 3], "floats": [0.5, 1.5], "bools": [True, False], "texts": ["a", "", "é"]}
    for name, values in arrays.items():
        writer.add_array(name, values)
    writer.add_key_value("empty", "", gguf.GGUFValueType.STRING)
    finish(writer)

    metadata = GgufFile(tmp_path / "a.gguf").metadata

    assert metadata == {"general.architecture": "llama"} | wanted | arrays | {"empty": ""}
    assert all(type(metadata[name]) is type(value) for name, value in wanted.items())


def test_nested_and_empty_arrays(tmp_path: Path) -> None:
    def array(kind: int, *members: bytes) -> bytes:
        return kind.to_bytes(4, "little") + len(members).to_bytes(8, "little") + b"".join(members)

    nested = array(ARRAY, array(U8, b"\1", b"\2"), array(STRING, stored_text("x")), array(U32))
    (tmp_path / "a.gguf").write_bytes(raw_file([key("k", ARRAY, nested)]))
    assert GgufFile(tmp_path / "a.gguf").metadata == {"k": [[1, 2], ["x"], []]}


def test_version_2_is_read_and_others_are_not(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf")
    raw = path.read_bytes()
    wanted = GgufFile(path).read("bank")
    path.write_bytes(raw[:4] + b"\2\0\0\0" + raw[8:])
    assert GgufFile(path).version == 2 and torch.equal(GgufFile(path).read("bank"), wanted)
    for version, words in (
        (b"\1\0\0\0", "version 1"),
        (b"\4\0\0\0", "newer glm5"),
        (b"\0\0\0\3", "big-endian"),
    ):
        path.write_bytes(raw[:4] + version + raw[8:])
        with refused(CheckpointError, path, words):
            GgufFile(path)


@pytest.mark.parametrize("alignment", [8, 1024])
def test_another_alignment(tmp_path: Path, alignment: int) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(alignment)
    writer.add_tensor("a", MATRIX[:1, :5])
    writer.add_tensor("b", MATRIX)
    finish(writer)
    found = GgufFile(tmp_path / "a.gguf")
    assert found.alignment == alignment and found.tensors["b"].start % alignment == 0
    assert torch.equal(found.read("b"), torch.from_numpy(MATRIX))


def test_a_type_without_decoder_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(raw_file(tensors=[entry("odd", [256], 15)], data=b"\0" * 292))
    found = GgufFile(path)
    assert found.tensors["odd"].type.name == "Q8_K"
    with refused(CheckpointError, path, "odd", "Q8_K", "Q4_K"):
        found.read("odd")


@pytest.mark.parametrize("scale", [b"\0\x7e", b"\0\x7c"], ids=["NaN", "infinite"])
def test_a_broken_scale_is_refused(tmp_path: Path, scale: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(raw_file(tensors=[entry("w", [32, 2], 8)], data=b"\0" * 34 + scale + b"\1" * 32))
    assert torch.equal(GgufFile(path).read("w", slice(0, 1)), torch.zeros(1, 32))
    with refused(CheckpointError, path, "w", "NaN or infinite scale"):
        GgufFile(path).read("w")


# --- split models -----------------------------------------------------------------------------------


def split(directory: Path) -> list[Path]:
    """Three parts with one tensor each."""
    written(directory / "m.gguf", split_max_tensors=1)
    return sorted(directory.glob("*.gguf"))


def test_a_split_model_is_opened_by_its_first_part(tmp_path: Path) -> None:
    paths = split(tmp_path)
    assert [path.name for path in paths] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    found = GgufFile(paths[0])
    assert list(found.tensors) == ["vector", "matrix", "bank"]
    assert found.architecture == "llama"
    assert torch.equal(found.read("bank"), torch.from_numpy(BANK))


def test_split_models_that_do_not_fit_together(tmp_path: Path) -> None:
    first, second, third = split(tmp_path)
    with refused(CheckpointError, second, "not the first part", first.name):
        GgufFile(second)
    second_bytes = second.read_bytes()
    second.unlink()
    with refused(CheckpointError, second, "no such file"):
        GgufFile(first)
    second.write_bytes(third.read_bytes())
    with refused(CheckpointError, second, "part 2 of 3"):
        GgufFile(first)
    second.write_bytes(second_bytes.replace(b"matrix", b"vector"))
    with refused(CheckpointError, second, "vector stands in", first.name):
        GgufFile(first)
    second.write_bytes(second_bytes)
    whole = first.rename(tmp_path / "renamed.gguf")
    with refused(CheckpointError, whole, "-00001-of-00003.gguf"):
        GgufFile(whole)


def test_a_wrong_number_of_split_tensors(tmp_path: Path) -> None:
    first, *_ = split(tmp_path)
    raw = first.read_bytes()
    name = b"split.tensors.count" + (5).to_bytes(4, "little")
    assert name in raw
    first.write_bytes(raw.replace(name + b"\3", name + b"\4"))
    with refused(CheckpointError, first, "says 4 tensors in 3 files", "they hold 3"):
        GgufFile(first)
