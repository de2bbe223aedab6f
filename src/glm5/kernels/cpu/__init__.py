"""The native CPU library, with tensors instead of addresses: the one door to it.

Every shape, dtype and index is checked here. What a call computes does not depend on the rows beside a row,
on how tokens are grouped into calls or on the number of threads; `glm5.kernels.reference` says what it is.
"""

from __future__ import annotations

from glm5.kernels.cpu.attention import (
    MAX_INDEX_HEADS,
    MAX_INDEX_WIDTH,
    attend,
    attend_grouped,
    select,
)
from glm5.kernels.cpu.draft import DraftCalls
from glm5.kernels.cpu.experts import ExpertBank, MoeLayer, Told
from glm5.kernels.cpu.layer import CacheRows, DecoderLayer, Pass
from glm5.kernels.cpu.matrix import Matrix, Vector, linear, rms_norm, take_rows
from glm5.kernels.cpu.native import instruction_set, instruction_sets, set_threads, threads
from glm5.kernels.cpu.rounding import Rounded, round_weights
from glm5.kernels.slots import Slots

__all__ = [
    "MAX_INDEX_HEADS", "MAX_INDEX_WIDTH", "CacheRows", "DecoderLayer", "DraftCalls", "ExpertBank", "Matrix",
    "MoeLayer", "Pass", "Rounded", "Slots", "Told", "Vector", "attend", "attend_grouped", "instruction_set",
    "instruction_sets", "linear", "rms_norm", "round_weights", "select", "set_threads", "take_rows",
    "threads",
]  # fmt: skip
