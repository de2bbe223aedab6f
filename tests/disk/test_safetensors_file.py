"""One file: the official library as the oracle in both directions, and headers that lie."""

from __future__ import annotations

import json
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm5.disk.safetensors_file import DTYPES, PlannedTensor, SafetensorsFile, write_safetensors
from glm5.errors import CheckpointError
from tests.checkpoint.checkpoint_fixture import Tensors, assert_same_bits, read, refused, write

quick = settings(max_examples=100, deadline=None)
many = settings(max_examples=300, deadline=None)


@contextmanager
def scratch(content: bytes = b"") -> Iterator[Path]:
    """A file of its own for one example of hypothesis."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x.safetensors"
        path.write_bytes(content)
        yield path


def random_tensor(dtype: torch.dtype, shape: list[int], seed: int) -> Tensor:
    """Random bits, NaNs and infinities among them."""
    count = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(high, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def is_storable(tensor: Tensor) -> bool:
    """A byte of F4 holds two values of the last extent, so that there must be one."""
    return tensor.dtype != torch.float4_e2m1fn_x2 or tensor.dim() > 0


names = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4)
stored_tensors = st.dictionaries(
    names,
    st.builds(random_tensor, st.sampled_from(list(DTYPES.values())), shapes, st.integers(0, 2**32)).filter(
        is_storable
    ),
    max_size=6,
)


@quick
@given(stored_tensors, st.none() | st.dictionaries(st.text(max_size=4), st.text(max_size=4), min_size=1))
def test_files_of_the_official_library_are_read_to_the_bit(
    tensors: Tensors, metadata: dict[str, str] | None
) -> None:
    with scratch() as path:
        safetensors.torch.save_file(tensors, path, metadata)
        assert_same_bits(read(path), tensors)


@quick
@given(stored_tensors)
def test_our_files_are_read_by_the_official_library(tensors: Tensors) -> None:
    with scratch() as path:
        write(path, tensors)
        assert_same_bits(safetensors.torch.load_file(path), tensors)
        assert_same_bits(read(path), tensors)


def test_every_dtype_of_the_official_library_is_known() -> None:
    assert safetensors.torch._TYPES.items() <= DTYPES.items()
    assert safetensors.torch._SIZE.keys() <= set(DTYPES.values())  # what it can write


def test_a_byte_of_f4_counts_as_two_values_in_the_header_only(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    pairs = torch.arange(6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).reshape(2, 3)
    scales = torch.arange(255, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    write(path, {"pairs": pairs, "scales": scales})
    with safetensors.safe_open(path, "pt") as file:
        assert (file.get_slice("pairs").get_dtype(), file.get_slice("pairs").get_shape()) == ("F4", [2, 6])
        assert file.get_slice("scales").get_dtype() == "F8_E8M0"
    found = SafetensorsFile(path).tensors
    assert {name: (info.dtype_name, info.shape, info.num_bytes) for name, info in found.items()} == {
        "pairs": ("F4", (2, 3), 6),
        "scales": ("F8_E8M0", (255,), 255),
    }
    assert read(path)["scales"].float().tolist() == [2.0 ** (byte - 127) for byte in range(255)]


def test_a_tensor_is_read_into_the_memory_where_it_stays(tmp_path: Path) -> None:
    values = random_tensor(torch.bfloat16, [3, 5], 0)
    write(tmp_path / "x.safetensors", {"before": values + 1, "a": values})
    bank = torch.zeros(4, 3, 5, dtype=torch.bfloat16)
    SafetensorsFile(tmp_path / "x.safetensors").read_into("a", bank[2])
    assert_same_bits({"a": bank[2]}, {"a": values})
    assert not bank[[0, 1, 3]].any()


def test_the_writer_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def values() -> Tensor:
        assert not any(reference() is not None for reference in alive)
        tensor = torch.ones(7)
        alive.append(weakref.ref(tensor))
        return tensor

    planned = (PlannedTensor(name, torch.float32, (7,), values) for name in "abc")
    write_safetensors(tmp_path / "x.safetensors", planned)
    assert len(alive) == 3


GOOD: dict[str, Any] = {
    "first": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
    "second": {"dtype": "BF16", "shape": [3], "data_offsets": [8, 14]},
}
DATA = bytes(range(14))


def packed(header: Any, data: bytes = DATA, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(**changes: Any) -> dict[str, Any]:
    """The good header with the second tensor's entry changed."""
    return GOOD | {"second": GOOD["second"] | changes}


def read_or_refuse(path: Path) -> Tensors | None:
    """All tensors, or None after a proper refusal; any other exception fails the test."""
    try:
        return read(path)
    except CheckpointError as error:
        message = str(error)
    assert str(path) in message
    assert message.isprintable()
    return None


def test_a_file_cut_or_stretched_anywhere_is_refused(tmp_path: Path) -> None:
    whole, path = packed(GOOD), tmp_path / "x.safetensors"
    for content in (*(whole[:size] for size in range(len(whole))), whole + b"\0", whole + b"\0" * 4096):
        path.write_bytes(content)
        assert read_or_refuse(path) is None, len(content)
    path.write_bytes(whole)
    assert len(read(path)) == 2


TRUE = len(packed(GOOD)) - 8 - len(DATA)


@pytest.mark.parametrize(
    "length", [0, 1, TRUE - 1, TRUE + 1, TRUE + 14, TRUE + 15, 10**8 + 1, 2**31, 2**63, 2**64 - 1]
)
def test_a_header_length_that_lies_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(packed(GOOD, length=length))
    with refused(CheckpointError, path):
        read(path)


LIES: dict[str, tuple[Any, str]] = {
    "not UTF-8": (b'{"\xff": 1}', "not JSON"),
    "not JSON": (b'{"first": ', "not JSON"),
    "two documents": (b"{} {}", "not JSON"),
    "a list": ([GOOD], "JSON list"),
    "an endless number": (b'{"first": {"shape": [' + b"9" * 5000 + b"]}}", "not JSON"),
    "deep lists": (b"[" * 200_000, "not JSON"),
    "deep objects": (b'{"a":' * 200_000, "not JSON"),
    "a name twice": (json.dumps(GOOD).replace("second", "first").encode(), "first"),
    "a key twice": (json.dumps(GOOD).replace('"shape": [3]', '"dtype": "F32"').encode(), "dtype"),
    "an entry that is none": (GOOD | {"second": [1]}, "second"),
    "a newline in a name": (GOOD | {"sec\nond": {}}, "sec\\nond"),
    "half a character in a name": (b'{"sec\\ud800ond": {}}', "sec\\ud800ond"),
    "an endless name": (GOOD | {"x" * 100_000: {}}, "xxx"),
    "overlapping data": (entry(data_offsets=[6, 12]), "second"),
    "a hole": (entry(data_offsets=[9, 15]), "second"),
    "falling offsets": (entry(data_offsets=[14, 8]), "second"),
    "data past the end": (entry(shape=[8], data_offsets=[8, 24]), "the file has"),
    "data nobody names": (entry(shape=[2], data_offsets=[8, 12]), "the file has"),
    "a wrong size": (entry(shape=[4]), "second"),
    "nothing at all": ({}, "the file has"),
    "a wrong size of F8_E8M0": (entry(dtype="F8_E8M0"), "second: F8_E8M0 [3] needs 3 bytes"),
    "a wrong size of F4": (entry(dtype="F4", shape=[3, 8]), "second: F4 [3, 8] needs 12 bytes"),
    "half a byte of F4": (entry(dtype="F4", shape=[4, 3]), "second: F4 [4, 3] has half a byte"),
    "one value of F4": (entry(dtype="F4", shape=[], data_offsets=[8, 8]), "second: F4 [] has half a byte"),
}
for bad in (None, "3", [-3], [True, 3], [3.0], ["3"], [[3]], {"0": 3}, [1] * 9, [2**63, 2**63], [9e99]):
    LIES[f"shape {bad!r:.20}"] = (entry(shape=bad), "second")
for bad in ([2**62, 2**62, 0], [0, 2**62, 2**62], [10**4000] * 8, [2**64 // 2, 2], [2**32] * 2 + [3]):
    LIES[f"too large a shape {bad!r:.20}"] = (entry(shape=bad, data_offsets=[8, 8]), "second")
for bad in (None, 8, [8], [8, 14, 20], [8.0, 14.0], [True, 14], [-8, 14], ["8", "14"], [8, 10**4000]):
    LIES[f"offsets {bad!r:.20}"] = (entry(data_offsets=bad), "second")
for bad in (None, "F31", "bf16", "", 7, ["BF16"], {}, "B\nF16"):
    LIES[f"dtype {bad!r:.20}"] = (entry(dtype=bad), "second")


@pytest.mark.parametrize("what", LIES)
def test_a_header_that_lies_is_refused_by_name(tmp_path: Path, what: str) -> None:
    header, words = LIES[what]
    path = tmp_path / "x.safetensors"
    path.write_bytes(packed(header))
    with refused(CheckpointError, path, words):
        read(path)


@pytest.mark.parametrize("depth", [100, 300, 700, 900, 950, 980, 1000])
def test_a_shape_nested_to_the_recursion_limit_is_refused(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "x.safetensors"
    shape = b"[" * depth + b"]" * depth
    path.write_bytes(
        packed(b'{"second": {"dtype": "F32", "shape": ' + shape + b', "data_offsets": [0, 14]}}')
    )
    with refused(CheckpointError, path):
        read(path)


flip = st.tuples(st.integers(0, len(packed(GOOD)) - 1), st.integers(0, 255))
json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
small = st.integers(0, 16) | st.integers(-1, 2**65)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F7"]) | json_values,
        "shape": st.lists(small, max_size=3) | json_values,
        "data_offsets": st.lists(small, min_size=2, max_size=2) | json_values,
    }
)


@many
@given(st.lists(flip, min_size=1, max_size=4))
def test_flipped_bytes_are_read_or_refused(changes: list[tuple[int, int]]) -> None:
    content = bytearray(packed(GOOD))
    for position, value in changes:
        content[position] = value
    with scratch(bytes(content)) as path:
        read_or_refuse(path)


@many
@given(st.dictionaries(names, entries | json_values, max_size=3) | json_values, st.binary(max_size=24))
def test_random_headers_are_refused_wherever_the_official_library_refuses(header: Any, data: bytes) -> None:
    with scratch(packed(header, data)) as path:
        ours = read_or_refuse(path)
        if ours is not None:
            assert_same_bits(ours, safetensors.torch.load_file(path))


def test_a_file_that_goes_or_shrinks_after_its_header_was_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    damage: list[Callable[[], Any]] = [lambda: path.write_bytes(packed(GOOD)[:-3]), path.unlink]
    for harm in damage:
        path.write_bytes(packed(GOOD))
        file = SafetensorsFile(path)
        assert len(file.tensors) == 2
        harm()
        with refused(CheckpointError, path, "second"):
            file.read("second")
    path.mkdir()
    with refused(CheckpointError, path):
        read(path)
