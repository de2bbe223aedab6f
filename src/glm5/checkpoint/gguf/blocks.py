"""The block types of ggml: their sizes, and values of their blocks by the `gguf` package.

A row is cut into blocks of 32 to 256 weights that share scales. Sizes are checked here before anything is
read; decoding takes bands of whole blocks, so that a tensor is never held twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockType:
    """One storage type of a GGUF file (enum ggml_type)."""

    number: int
    name: str
    elements: int
    bytes: int

    @property
    def has_scales(self) -> bool:
        return self.elements > 1

    @property
    def is_decoded(self) -> bool:
        """Can its values be read? The others are known by their size only."""
        return self.name not in _SIZE_ONLY

    def decode(self, block_NB: Tensor) -> Tensor:
        """uint8 [N, bytes] to fp32 [N, elements]."""
        import gguf  # 0.1 s, and only needed where a GGUF is read
        import numpy as np

        with np.errstate(all="ignore"):  # what is not finite is refused by who reads the file
            values = gguf.quants.dequantize(block_NB.numpy(), gguf.GGMLQuantizationType(self.number))
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).view(-1, self.elements)


_SIZE_ONLY = ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "Q1_0", "Q2_0")
_SIZES = (
    (0, "F32", 1, 4), (1, "F16", 1, 2), (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20), (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24), (8, "Q8_0", 32, 34), (9, "Q8_1", 32, 36), (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110), (12, "Q4_K", 256, 144), (13, "Q5_K", 256, 176), (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292), (16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74), (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50), (20, "IQ4_NL", 32, 18), (21, "IQ3_S", 256, 110), (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136), (24, "I8", 1, 1), (25, "I16", 1, 2), (26, "I32", 1, 4), (27, "I64", 1, 8),
    (28, "F64", 1, 8), (29, "IQ1_M", 256, 56), (30, "BF16", 1, 2), (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66), (39, "MXFP4", 32, 17), (40, "NVFP4", 64, 36), (41, "Q1_0", 128, 18),
    (42, "Q2_0", 64, 18),
)  # fmt: skip
TYPES = {number: BlockType(number, name, elements, size) for number, name, elements, size in _SIZES}
DECODED = tuple(kind.name for kind in TYPES.values() if kind.is_decoded)
