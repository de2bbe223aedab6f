"""Hostile and damaged files: a CheckpointError in one line, in little time and memory, never more."""

from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glm5.checkpoint.gguf import GgufFile, GgufModel, header, tokenizer_files
from glm5.errors import CheckpointError
from tests.checkpoint.checkpoint_fixture import refused
from tests.checkpoint.gguf.gguf_fixture import (
    ARRAY,
    BOOL,
    STRING,
    U8,
    U32,
    U64,
    key,
    lively_model,
    raw_file,
    tensor,
    text,
    write_model,
)  # fmt: skip
from tests.model_fixture import tiny_config

HUGE = [1 << 63, (1 << 64) - 1, 1 << 62, 1 << 40]
NAME = key("general.name", STRING, text("x"))


def array(kind: int, count: int, members: bytes = b"") -> bytes:
    return kind.to_bytes(4, "little") + count.to_bytes(8, "little") + members


def u64(value: int) -> bytes:
    return value.to_bytes(8, "little")


def nested(depth: int) -> bytes:
    return array(U8, 0) if depth == 0 else array(ARRAY, 1, nested(depth - 1))


# What the file holds, and the words of its refusal.
DAMAGED: dict[str, tuple[Any, ...]] = {
    "empty": (b"", "byte 0", "the file ends here"),
    "text": (b"hello, world", "begins with 'hell'", "another format"),
    "magic only": (b"GGUF", "the file ends here"),
    "no counts": (b"GGUF\3\0\0\0", "byte 8", "the file ends here"),
    "keys beyond the file": (raw_file([NAME], num_keys=2), "key 2 of 2"),
    "tensors beyond the file": (raw_file([], num_tensors=1), "tensors, the file ends after"),
    "a key twice": (raw_file([NAME, NAME]), "key general.name", "twice"),
    "a key's name is not UTF-8": (raw_file([key(b"\xff", U8, b"\0")]), "key 1 of 1", "not UTF-8"),
    "a value is not UTF-8": (raw_file([key("k", STRING, text(b"ab\xc3"))]), "key k", "UTF-8 at its byte 2"),
    "a value of unknown type": (raw_file([key("k", 13, b"\0")]), "key k", "value type 13"),
    "an array of unknown type": (raw_file([key("k", ARRAY, array(99, 1, b"\0"))]), "key k", "value type 99"),
    "a bool of 2": (raw_file([key("k", BOOL, b"\2")]), "key k", "neither 0 nor 1"),
    "an array that is cut off": (raw_file([key("k", ARRAY, array(U64, 9))]), "key k", "9 array members"),
    "arrays without end": (raw_file([key("k", ARRAY, nested(9))]), "key k", "nested more than 4 deep"),
    "alignment 0": (raw_file([key("general.alignment", U32, b"\0\0\0\0")]), "alignment", "power of two"),
    "alignment 24": (raw_file([key("general.alignment", U32, b"\x18\0\0\0")]), "alignment", "power of two"),
    "alignment true": (raw_file([key("general.alignment", BOOL, b"\1")]), "alignment", "power of two"),
    "a tensor twice": (
        raw_file(tensors=[tensor("w", [8]), tensor("w", [8], offset=32)], data=b"\0" * 64), "w", "twice"),
    "a tensor's name is not UTF-8": (raw_file(tensors=[tensor(b"\xc0", [1])]), "tensor 1 of 1", "not UTF-8"),
    "an unprintable name": (
        raw_file(tensors=[tensor("a\nb\x1b", [1], 77)]), r"'a\nb\x1b'", "unknown type 77"),
    "a very long name": (raw_file(tensors=[tensor("w" * 2000, [1])]), "2000 bytes of text"),
    "five dimensions": (raw_file(tensors=[tensor("w", [1] * 5)]), "w", "5 dimensions"),
    "a size of 0": (raw_file(tensors=[tensor("w", [4, 0])]), "w", "shape [0, 4] is empty"),
    "an unknown type": (raw_file(tensors=[tensor("w", [32], 4)]), "w", "unknown type 4"),
    "a row that is no block": (raw_file(tensors=[tensor("w", [33], 8)]), "w", "Q8_0", "32", "33"),
    "an offset that is not aligned": (
        raw_file(tensors=[tensor("w", [1], 0, 4)], data=b"\0" * 8), "w", "offset 4"),
    "a tensor past the end": (
        raw_file(tensors=[tensor("w", [9])], data=b"\0" * 32), "w", "ends at byte 100, the file has 96"),
    "tensors that overlap": (
        raw_file(tensors=[tensor("a", [9]), tensor("b", [8], 0, 32)], data=b"\0" * 64), "b", "inside a"),
    "tensors in one place": (
        raw_file(tensors=[tensor("a", [8]), tensor("b", [8])], data=b"\0" * 64), "b", "inside a"),
    "too many parts": (raw_file([key("split.count", U32, b"\2\0\0\0")]), "a model in 2 files"),
    "parts in words": (raw_file([key("split.count", STRING, text("3"))]), "split.count", "not a count"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(tmp_path: Path, case: str) -> None:
    content, *words = DAMAGED[case]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with refused(CheckpointError, path, *words):
        GgufFile(path)


@pytest.mark.parametrize("count", HUGE)
@pytest.mark.parametrize(
    "build",
    [
        lambda n: raw_file([NAME], num_keys=n),
        lambda n: raw_file([NAME], num_tensors=n),
        lambda n: raw_file([u64(n) + b"name" + bytes(64)]),
        lambda n: raw_file([key("k", STRING, u64(n) + bytes(64))]),
        lambda n: raw_file([key("k", ARRAY, array(U8, n, bytes(64)))]),
        lambda n: raw_file([key("k", ARRAY, array(STRING, n, bytes(64)))]),
        lambda n: raw_file([key("k", ARRAY, array(ARRAY, n, bytes(64)))]),
        lambda n: raw_file(tensors=[u64(n) + b"name" + bytes(64)]),
        lambda n: raw_file(tensors=[tensor("w", [n])], data=bytes(64)),
        lambda n: raw_file(tensors=[tensor("w", [n, n, n, n])], data=bytes(64)),
        lambda n: raw_file(tensors=[tensor("w", [8], offset=n & ~31)], data=bytes(64)),
    ],
    ids=["keys", "tensors", "key name", "text", "numbers", "texts", "arrays", "tensor name", "extent",
         "extents", "offset"],
)  # fmt: skip
@pytest.mark.parametrize("sparse", [False, True], ids=["small file", "file of 64 GiB of zeros"])
def test_huge_numbers_cost_nothing(tmp_path: Path, build: object, count: int, sparse: bool) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(build(count))  # type: ignore[operator]
    if sparse:
        os.truncate(path, 64 << 30)
    tracemalloc.start()
    started = time.perf_counter()
    try:
        with refused(CheckpointError, path):
            GgufFile(path)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 4 << 20 and time.perf_counter() - started < 1


def test_the_header_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(raw_file([key(f"k{n}", STRING, text("x" * 1000)) for n in range(9)]))
    GgufFile(path)
    monkeypatch.setattr(header, "MAX_HEADER_BYTES", 4096)
    with refused(CheckpointError, path, "key k", "longer than"):
        GgufFile(path)
    path.write_bytes(raw_file([key(f"k{n}", ARRAY, array(U8, 100, bytes(100))) for n in range(9)]))
    monkeypatch.setattr(header, "MAX_MEMBERS", 450)
    with refused(CheckpointError, path, "key k4", "100 array members, at most 50"):
        GgufFile(path)


def test_missing_files_and_directories(tmp_path: Path) -> None:
    with refused(CheckpointError, tmp_path / "absent.gguf", "no such file"):
        GgufFile(tmp_path / "absent.gguf")
    with refused(CheckpointError, tmp_path, "cannot be read"):
        GgufFile(tmp_path)


# --- a whole model, damaged anywhere ----------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small model with a vocabulary: header first, then data."""
    config = tiny_config("glm4_moe_lite", num_hidden_layers=2, n_routed_experts=2)
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "glm4",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<|user|>"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 3,
    }
    path = tmp_path_factory.mktemp("whole") / "a.gguf"
    return write_model(path, lively_model(config), keys=keys).read_bytes()


def header_size(raw: bytes, path: Path) -> int:
    path.write_bytes(raw)
    return min(tensor.start for tensor in GgufFile(path).tensors.values())


def refusal(path: Path) -> str | None:
    """Ask a file for everything; only CheckpointError may come out, whose message is returned."""
    try:
        found = GgufFile(path)
        try:
            GgufModel(found)
        finally:
            tokenizer_files(found)
    except CheckpointError as error:
        return str(error)
    return None


def test_truncated_anywhere(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    end = header_size(whole, path)
    for size in [*range(end - 1, -1, -7), len(whole) - 1, (end + len(whole)) // 2]:
        path.write_bytes(whole[:size])
        with refused(CheckpointError, path):
            GgufFile(path)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_anywhere(whole: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """Bytes of the header replaced, put in and taken out, and numbers made huge."""
    path = tmp_path / "a.gguf"
    end = header_size(whole, path)
    raw = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, end - 1))
        kind = data.draw(st.sampled_from(["replace", "insert", "remove", "huge"]))
        if kind == "replace":
            raw[at] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        elif kind == "remove":
            del raw[at : at + data.draw(st.integers(1, 9))]
        else:
            raw[at : at + 8] = u64(data.draw(st.sampled_from(HUGE)))
    path.write_bytes(raw)
    message = refusal(path)
    if message is not None:
        assert str(path) in message and message.isprintable() and len(message) < 2000
