"""What stands around an MTP layer, by calls that are prepared once: a guess is worth no more than its time.

The embedding of the known tokens, both norms and the projection before the layer; the norm and the output
head behind it. The layer itself is a `DecoderLayer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glm5.kernels.cpu.matrix import Matrix
from glm5.kernels.cpu.native import ACTIVATIONS, fill, floats, library, need


class DraftCalls:
    """Reads up to `most` tokens at a time. Its results lie in its own memory until the next call.

    embedding, head: [vocabulary, D]. join: [D, 2 D], of [norm(embedding), norm(hidden)]. enorm, hnorm, norm:
    fp32 [D] with their eps. dtype: of the activations, fp32 or bf16.
    Raises ValueError when sizes contradict each other.
    """

    def __init__(
        self, embedding: Matrix, join: Matrix, head: Matrix, *, enorm: tuple[Tensor, float],
        hnorm: tuple[Tensor, float], norm: tuple[Tensor, float], dtype: torch.dtype, most: int,
    ) -> None:  # fmt: skip
        width = embedding.columns
        need(dtype in ACTIVATIONS, f"activations are {dtype}, not fp32 or bf16")
        need((join.rows, join.columns) == (width, 2 * width), f"join is not [{width}, {2 * width}]")
        need(head.columns == width, f"the head is not {width} wide")
        self.most, self.dtype, self._bf16 = most, dtype, dtype == torch.bfloat16
        self._embedding, self._join, self._head = embedding, join, head
        self._ids = np.zeros(most, dtype=np.int64)
        self._embedded = torch.empty(most, width, dtype=dtype)
        self._joined = torch.empty(most, 2 * width, dtype=dtype)
        self._x = torch.empty(1, most, width, dtype=dtype)
        self._normed = torch.empty(1, width, dtype=dtype)
        self._logits = torch.empty(1, head.rows)
        self._kept = [weight.detach().float().contiguous() for weight, _ in (enorm, hnorm, norm)]
        for weight in self._kept:
            floats(weight, width, "norm weights")

        def norm_call(which: int, eps: float, x: Tensor, out: Tensor, stride: int = 0) -> Any:
            return fill(
                library.NormCall(), x=x, out=out, weight=self._kept[which], eps=eps, bf16=self._bf16, count=1,
                cols=width, stride=stride,
            )  # fmt: skip

        self._enorm = norm_call(0, enorm[1], self._embedded, self._joined, 2 * width)
        self._hnorm = norm_call(1, hnorm[1], self._embedded, self._joined[0, width:], 2 * width)
        self._norm = norm_call(2, norm[1], self._embedded, self._normed)
        self._in = fill(library.LinearCall(), x=self._joined, x_bf16=self._bf16, count=1)
        self._in_out = fill(library.LinearOutput(), out=self._x, stride=width, bf16=self._bf16)
        self._by_head = fill(library.LinearCall(), x=self._normed, x_bf16=self._bf16, count=1)
        self._by_head_out = fill(library.LinearOutput(), out=self._logits, stride=head.rows)

    def read(self, ids: Sequence[int], hidden_ND: Tensor) -> Tensor:
        """The MTP layer's input [1, N, D] for tokens and the hidden states that stand before them."""
        count, width = len(ids), self._normed.shape[1]
        need(
            0 < count <= self.most and hidden_ND.shape == (count, width),
            f"{count} tokens, {self.most} at most",
        )
        need(
            hidden_ND.dtype == self.dtype and hidden_ND.is_contiguous(),
            f"hidden states are {hidden_ND.dtype}",
        )
        self._ids[:count] = ids
        library.take_rows(
            self._embedding.handle, self._ids.ctypes.data, self._embedded.data_ptr(), self._bf16, count
        )
        self._hnorm.x = hidden_ND.data_ptr()
        self._enorm.count = self._hnorm.count = self._in.count = count
        library.norm_rows(self._enorm)
        library.norm_rows(self._hnorm)
        library.linear(self._in, self._in_out, self._join.handle)
        return self._x[:, :count]

    def judge(self, x_1D: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden state [1, D], logits fp32 [1, vocabulary]) of what the layer made of a token."""
        need(x_1D.dtype == self.dtype and x_1D.is_contiguous(), f"the layer's result is {x_1D.dtype}")
        self._norm.x = x_1D.data_ptr()
        library.norm_rows(self._norm)
        library.linear(self._by_head, self._by_head_out, self._head.handle)
        return self._normed, self._logits
