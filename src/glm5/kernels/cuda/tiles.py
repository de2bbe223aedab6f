"""The sizes of tiles, by the shape of a layer: fixed tables, so that results stay the same.

Nothing here is timed at run time, and nothing of a matrix's split depends on how many rows of
activations it meets. The figures are reasoned, not measured: no GPU was at hand.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from glm5.kernels.cuda.launch import ceil_div, need, next_power

# Up to here a product reads each weight once and multiplies in fp32; beyond, tensor cores do.
FEW_ROWS = 8
# A program of the first kind: 8 weight rows, 64 words (two 128-byte lines) of each at a time: four 128-bit
# loads a thread. One warp, which waits for nobody.
BAND_ROWS, BAND_WORDS, BAND_WARPS = 8, 64, 1
# About 15 programs for each of 132 multiprocessors, as many as their registers allow: 2 KB each are on
# their way at a time. Matrices of fewer bands are split along their columns.
PROGRAMS = 2048


class Units(NamedTuple):
    """A row of codes as runs of columns that share a scale."""

    bits: int
    columns: int  # of a unit: a power of two
    across: int  # a row
    per_group: int

    @property
    def words(self) -> int:
        return self.columns * self.bits // 32

    @property
    def row_words(self) -> int:
        return self.across * self.words

    @property
    def groups(self) -> int:
        return self.across // self.per_group

    def constants(self) -> dict[str, int]:
        """What the programs are compiled for."""
        return {"bits": self.bits, "unit_columns": self.columns, "units_per_group": self.per_group}


def units_of(columns: int, bits: int, group: int) -> Units:
    """Raises ValueError for what `PackedLinear` would not hold."""
    need(bits in (4, 8), f"codes have {bits} bits, not 4 or 8")
    need(group > 0 and group % 32 == 0, f"groups of {group} are no multiple of 32")
    need(columns > 0 and columns % group == 0, f"{columns} columns are no whole groups of {group}")
    unit = math.gcd(group, 64)  # wider ones would not fit the shared memory of small GPUs
    return Units(bits, unit, columns // unit, group // unit)


class Bands(NamedTuple):
    """How few rows of activations meet a matrix: `splits` parts of `tiles` tiles along the columns."""

    tile_units: int
    tiles: int  # of the whole row
    tiles_per_split: int
    splits: int


def bands_of(rows: int, units: Units) -> Bands:
    tile_units = min(next_power(units.across), max(1, BAND_WORDS // units.words))
    tiles = ceil_div(units.across, tile_units)
    wanted = max(1, PROGRAMS // ceil_div(rows, BAND_ROWS))
    each = ceil_div(tiles, min(tiles, wanted))
    return Bands(tile_units, tiles, each, ceil_div(tiles, each))


class Tile(NamedTuple):
    """A program of the second kind: activation rows, weight rows, and how Triton compiles it."""

    tokens: int
    rows: int
    warps: int
    stages: int

    def constants(self) -> dict[str, int]:
        return {
            "tile_tokens": self.tokens, "tile_rows": self.rows, "num_warps": self.warps,
            "num_stages": self.stages,
        }  # fmt: skip


def linear_tile(tokens: int, rows: int, itemsize: int) -> Tile:
    """By token count and weight rows. The weight rows, and so the order of every sum, know no batch."""
    band = 128 if rows >= 4096 else 64
    if itemsize == 4:
        return Tile(64, 64, 8, 2)
    return Tile(64, band, 4, 3) if tokens <= 64 else Tile(128, band, 8, 3)


def expert_tile(tokens: int, experts: int, topk: int, itemsize: int) -> Tile:
    """By the mean load of an expert: 512 tokens of GLM-5 bring 16 rows to each."""
    load = tokens * topk / experts
    if load <= 8:
        return Tile(16, 64, 4, 3 if itemsize == 2 else 2)
    if load <= 32 or itemsize == 4:
        return Tile(32, 64, 4, 3 if itemsize == 2 else 2)
    return Tile(64, 64, 4, 3)
