"""Fills memory from a checkpoint, a few tensors at a time. Knows names, shapes and memory, no module.

Every name, shape and dtype is checked against the configuration before the first weight is read. Peak memory
is what is filled plus the one tensor that is being decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from glm5.checkpoint.directory import Checkpoint
from glm5.checkpoint.weights import check_leftovers
from glm5.disk.shards import ShardIndex
from glm5.errors import CheckpointError
from glm5.formats import CompressedTensors
from glm5.formats.packed import Packed, Scheme
from glm5.formats.packing import BITS

# Some copy while others wait for the disk.
READERS = 8
_BATCH_BYTES = 1 << 20
_READER_BYTES = 16 << 20
_SMALL_BYTES = 128 << 10
_SCALES = (torch.bfloat16, torch.float16, torch.float32)
Progress = Callable[[int, int], None]
SchemeOf = Callable[[str], Scheme | None]
Rounder = Callable[[Tensor, Scheme, str, Path], Packed]  # values, scheme, name, file


class Target(NamedTuple):
    """A weight that something wants, by its name on disk, and the memory it goes to.

    memory: called when the memory exists; gives a tensor for floats, `Packed` where there is a scheme.
    """

    name: str
    shape: tuple[int, ...]
    memory: Callable[[], Tensor | Packed]
    scheme: Scheme | None = None


@dataclass(frozen=True)
class _Source:
    """Tensors on disk (`first` of them decides the order) and what they fill."""

    target: Target
    first: str
    num_bytes: int


def plan_reads(checkpoint: Checkpoint, targets: Iterable[Target]) -> list[_Source]:
    """What to read, in file order; nothing missing, nothing left over.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of a wrong shape or dtype.
    """
    weights, index = checkpoint.weights, checkpoint.index
    used: set[str] = set()
    sources: list[_Source] = []
    for target in targets:
        parts = weights.parts(target.name)
        weights.check(target.name, target.shape)
        used.update(parts)
        sources.append(_Source(target, parts[0], weights.num_bytes(target.name)))
    check_leftovers(index, used, checkpoint.config)
    return sorted(sources, key=lambda source: (index.file(source.first).path, index[source.first].start))


def fill(
    checkpoint: Checkpoint,
    sources: list[_Source],
    *,
    rounder: Rounder | None = None,
    progress: Progress | None = None,
) -> None:
    """Read everything that was planned.

    rounder: rounds floats for the targets with a scheme; None = their codes are on disk.
    progress: called with (bytes read, bytes in all).

    Raises:
        CheckpointError: data is damaged, or cannot be read or rounded.
    """
    weights, index = checkpoint.weights, checkpoint.index
    decoding = Lock()  # takes memory for the tensor once more

    @torch.no_grad()  # a setting of each thread
    def read(source: _Source) -> int:
        target, memory = source.target, source.target.memory()
        if isinstance(memory, Tensor):
            small = source.num_bytes < _SMALL_BYTES
            with nullcontext() if small or weights.lies_as(target.name, memory) else decoding:
                weights.fill(target.name, memory)
        elif rounder is None:
            fill_packed(target.name, memory, index)
        else:
            assert target.scheme is not None
            values = weights.read(target.name).contiguous()
            rounded = rounder(values, target.scheme, target.name, index.file(source.first).path)
            memory.words.copy_(rounded.words)
            memory.scales.copy_(rounded.scales)
        return source.num_bytes

    # Rounding keeps all cores busy by itself, and one tensor in memory.
    _in_order(read, sources, READERS if rounder is None else 1, progress)


def _in_order(
    read: Callable[[_Source], int], sources: list[_Source], readers: int, progress: Progress | None
) -> None:
    """Call `read` on every source, a few at once; the first failure in their order is raised."""
    done, total = 0, sum(source.num_bytes for source in sources)
    # Readers of little only take Python's lock from each other.
    pool = ThreadPoolExecutor(max(1, min(readers, total // _READER_BYTES)))
    try:
        for count in pool.map(lambda batch: sum(map(read, batch)), _batches(sources)):
            done += count
            if progress is not None:
                progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(sources: list[_Source]) -> Iterator[list[_Source]]:
    """Neighbours in the files, together at least `_BATCH_BYTES`: a hand-over costs what a small read does."""
    batch: list[_Source] = []
    for source in sources:
        batch.append(source)
        if sum(each.num_bytes for each in batch) >= _BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def stored_scheme(checkpoint: Checkpoint) -> SchemeOf:
    """The scheme of a module whose codes the native kernels can use as they are stored; else None."""
    form, index = checkpoint.weights.formats[0], checkpoint.index

    def scheme_of(module: str) -> Scheme | None:
        words, scales = f"{module}.weight_packed", f"{module}.weight_scale"
        if not isinstance(form, CompressedTensors) or words not in index or scales not in index:
            return None
        group = form.group_of(module)
        if group is None or group.type != "int" or group.bits not in BITS or not group.symmetric:
            return None
        dtype = index[scales].dtype
        others = any(f"{module}.{name}" in index for name in ("weight_g_idx", "weight_zero_point"))
        rows, columns = form.shape(f"{module}.weight", index)
        across = index[scales].shape[-1]
        if others or dtype not in _SCALES or columns % 32 or columns % across or columns // across % 32:
            return None
        return Scheme(group.bits, columns // across, dtype) if index[scales].shape == (rows, across) else None

    return scheme_of


def fill_packed(name: str, memory: Packed, index: ShardIndex) -> None:
    """Read stored codes and scales straight into their memory."""
    module = name.removesuffix(".weight")
    for suffix, target in (("weight_packed", memory.words), ("weight_scale", memory.scales)):
        stored = f"{module}.{suffix}"
        if target.device.type == "cpu":
            index.file(stored).read_into(stored, target)
        else:
            target.copy_(index.file(stored).read(stored))
    if not _all_finite(memory.scales):
        stored = f"{module}.weight_scale"
        raise CheckpointError(
            f"{index.file(stored).path}: {stored} holds a NaN or infinite scale; download it again"
        )


_EXPONENTS = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}


def _all_finite(scales: Tensor) -> bool:
    """Infinities and NaN have all exponent bits set; in integers that is one pass."""
    whole = torch.int32 if scales.dtype == torch.float32 else torch.int16
    exponent = _EXPONENTS[scales.dtype]
    return not bool(((scales.view(whole) & exponent) == exponent).any())
