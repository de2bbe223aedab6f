"""The maths of one matrix: weights and the second moments of their inputs to codes and scales.

GPTQ (Frantar et al. 2022, arXiv 2210.17323, algorithm 1): columns are rounded from left to right, and
what one column loses is made up for by those not yet rounded, as far as the inputs are correlated.
Plain column order, since the layout has no g_idx. Leaves to others where the inputs come from.
Letters: T inputs, C columns of the weights, R rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from glm5.formats.packed import Scheme
from glm5.formats.packing import dequantize, pack, words_per_row
from glm5.kernels import cpu

# A whole Hessian and what its factor needs take 16 bytes a squared column: 1.1 GB at this width.
WIDEST_WHOLE = 8192
# Wider inputs are taken as independent blocks of about this many columns.
BLOCK_COLUMNS = 4096
# Columns whose errors are passed on to the rest of the matrix in one product (section 3.3, "lazy batches").
LAZY_COLUMNS = 128
# Rows are independent given the Hessian, so bands of about so many weights bound the memory.
BAND_WEIGHTS = 4 << 20
# Output errors are measured on this many rows.
SAMPLED_ROWS = 128


class Hessian:
    """Sum of x x^T over inputs x, fp32: block-diagonal where x is wider than WIDEST_WHOLE.

    Blocks are whole groups of columns. (The Hessian of the squared output error in a row of weights, up to
    a factor.)
    """

    def __init__(self, columns: int, group: int) -> None:
        self.columns, self.count = columns, 0.0
        step = columns if columns <= WIDEST_WHOLE else max(group, BLOCK_COLUMNS // group * group)
        self.spans = [slice(at, min(at + step, columns)) for at in range(0, columns, step)]
        self.blocks = [torch.zeros(s.stop - s.start, s.stop - s.start) for s in self.spans]

    def add(self, x: Tensor) -> None:
        """Count inputs [..., C]."""
        x_TC = x.reshape(-1, self.columns).float()
        for span, block in zip(self.spans, self.blocks, strict=True):
            part = x_TC[:, span]
            block.addmm_(part.T, part)
        self.count += x_TC.shape[0]

    def blend(self, other: Hessian, inputs: float) -> None:
        """Add so many inputs like the average one of `other`."""
        for block, more in zip(self.blocks, other.blocks, strict=True):
            block.add_(more, alpha=inputs / max(other.count, 1))
        self.count += inputs

    def energy(self, rows_RC: Tensor) -> float:
        """Sum over inputs and rows of (row . x)^2, blocks taken as independent."""
        total = 0.0
        for span, block in zip(self.spans, self.blocks, strict=True):
            part = rows_RC[:, span]
            total += float(((part @ block) * part).sum(dtype=torch.float64))
        return total


@dataclass(frozen=True)
class Factor:
    """Upper triangular U with U^T U = (H + damping)^-1, a block at a time."""

    spans: list[slice]
    blocks: list[Tensor]

    @classmethod
    def of(cls, hessian: Hessian, dampening_frac: float = 0.01) -> Factor:
        """dampening_frac: of the mean of the diagonal, added to it; ten times as much while H is singular.

        A Hessian without inputs gives the unit matrix: columns are then rounded one by one.
        """
        return cls(hessian.spans, [_inverse_factor(block, dampening_frac) for block in hessian.blocks])


def _inverse_factor(block: Tensor, dampening_frac: float) -> Tensor:
    mean = float(block.diagonal().mean(dtype=torch.float64))
    if not math.isfinite(mean) or mean < 1e-30:
        return torch.eye(block.shape[0])
    while True:
        # H = R R^T with R upper triangular is the Cholesky factor of the reversed matrix, reversed; then
        # H^-1 = R^-T R^-1, so U = R^-1: half the work of inverting first and factoring then.
        damped = (block / mean).flip(0, 1)
        damped.diagonal().add_(dampening_frac)
        lower, info = torch.linalg.cholesky_ex(damped)
        del damped
        if int(info) == 0:
            break
        dampening_frac = max(dampening_frac * 10, 1e-6)
    inverse = torch.linalg.solve_triangular(lower, torch.eye(block.shape[0]), upper=False)
    del lower
    return inverse.flip(0, 1).contiguous()


class Solved(NamedTuple):
    """Packed codes int32 [rows, words] and scales bf16 [rows, groups] of a matrix, and what they lose.

    error, energy: sums of squared differences and of squared weights; NaN if a weight is not finite.
    """

    words: Tensor
    scales: Tensor
    error: float
    energy: float

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.error / self.energy) if self.energy else 0.0


def solve(weight: Tensor, factor: Factor, scheme: Scheme) -> Solved:
    """Round float weights [R, C] to the scheme's grid, error feedback through `factor`.

    The scale of a group is searched by `round_weights` when its first column is reached, on the weights as
    the columns before have left them.
    """
    rows, columns = weight.shape
    words = torch.empty(rows, words_per_row(columns, scheme.bits), dtype=torch.int32)
    scales = torch.empty(rows, columns // scheme.group, dtype=torch.bfloat16)
    error = energy = 0.0
    for band in bands(rows, columns):
        values = weight[band].float()
        if not bool(values.isfinite().all()):
            return Solved(words, scales, math.nan, math.nan)
        left_CR = values.T.contiguous()
        codes_CR = torch.empty(left_CR.shape, dtype=torch.int8)
        for span, upper in zip(factor.spans, factor.blocks, strict=True):
            groups = slice(span.start // scheme.group, span.stop // scheme.group)
            found = _solve_block(left_CR[span], upper, scheme, codes_CR[span])
            scales[band, groups] = found
        words[band] = pack(codes_CR.T, scheme.bits)
        lost = dequantize(words[band], scales[band], scheme.bits, columns).sub_(values)
        error += float(lost.square_().sum(dtype=torch.float64))
        energy += float(values.square().sum(dtype=torch.float64))
    return Solved(words, scales, error, energy)


def bands(rows: int, columns: int) -> list[slice]:
    step = max(1, BAND_WEIGHTS // columns)
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def unpacked(words: Tensor, scales: Tensor, bits: int, columns: int) -> Tensor:
    """`dequantize`, fp32 [R, C], with the memory of a band besides the result's."""
    values = torch.empty(len(words), columns)
    for band in bands(*values.shape):
        values[band] = dequantize(words[band], scales[band], bits, columns)
    return values


def _solve_block(left_CR: Tensor, upper: Tensor, scheme: Scheme, codes_CR: Tensor) -> Tensor:
    """Codes into `codes_CR`; returns the scales [R, groups]. `left_CR` is used up."""
    group, columns = scheme.group, left_CR.shape[0]
    step = max(group, LAZY_COLUMNS // group * group)
    scales = []
    for start in range(0, columns, step):
        part, codes = left_CR[start : start + step], codes_CR[start : start + step]
        lost, end = torch.empty_like(part), start + part.shape[0]
        triangle = upper[start:end, start:end]
        for first in range(0, part.shape[0], group):
            values = part[first : first + group].T.contiguous()
            # An error in a column costs this much even if those after it make up for it (equation 2).
            importance = triangle.diagonal()[first : first + group].pow(-2)
            importance = importance / importance.max()
            rounded = cpu.round_weights(values, bits=scheme.bits, group=group, importance=importance)
            scale = rounded.scales[:, 0]
            _round_columns(part, codes, lost, triangle, range(first, first + group), scale, scheme.bits)
            scales.append(scale)
        if end < columns:
            left_CR[end:].addmm_(upper[start:end, end:].T, lost, alpha=-1)
    return torch.stack(scales, dim=1)


def _round_columns(
    part: Tensor, codes: Tensor, lost: Tensor, triangle: Tensor, group: range, scale: Tensor, bits: int
) -> None:
    """Round the columns of one group in turn; each one's error goes into those of `part` after it."""
    # As the native rounding has it, so that codes are the same where nothing is fed back.
    inverse, scale = (1.0 / scale.double()).float(), scale.float()
    lowest, highest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    diagonal = triangle.diagonal().tolist()
    for at in group:
        code = (part[at] * inverse).round_().clamp_(lowest, highest)
        codes[at] = code
        torch.sub(part[at], code.mul_(scale), out=lost[at]).div_(diagonal[at])
        if at + 1 < part.shape[0]:
            part[at + 1 :].addr_(triangle[at, at + 1 :], lost[at], alpha=-1)


def output_errors(weight: Tensor, hessian: Hessian, solved: Solved, scheme: Scheme) -> tuple[float, float]:
    """Relative errors of W x over the inputs: (nearest's, solved's).

    The root of squared error over squared outputs, on evenly spaced rows, SAMPLED_ROWS at most.
    """
    rows, columns = weight.shape
    picked = torch.linspace(0, rows - 1, min(rows, SAMPLED_ROWS)).round().long()
    values = weight[picked].float().contiguous()
    whole = hessian.energy(values)
    nearest = cpu.round_weights(values, bits=scheme.bits, group=scheme.group)
    if whole <= 0:
        return 0.0, 0.0
    found = []
    for words, scales in ((nearest.words, nearest.scales), (solved.words[picked], solved.scales[picked])):
        lost = dequantize(words, scales, scheme.bits, columns) - values
        found.append(math.sqrt(max(hessian.energy(lost), 0.0) / whole))
    return found[0], found[1]
