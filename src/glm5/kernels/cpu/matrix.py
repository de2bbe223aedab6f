"""Weight matrices and vectors where they lie, and the products with them.

Every shape and dtype is checked when a matrix is made; a call then costs a microsecond. Tensors given to
a matrix stay alive with it. Their values may change in place; their memory may not move.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5.formats.packing import words_per_row
from glm5.kernels.cpu.native import (
    ACTIVATIONS,
    FLOAT_CODES,
    activations,
    address,
    fill,
    floats,
    library,
    need,
)

_E4M3 = 9


class Matrix:
    """A weight matrix [rows, columns] in the layout of the checkpoint.

    weight: bf16, fp16 or fp32 [rows, columns]; e4m3 [rows, columns] with `scales` fp32 one a block;
        or int32 words of 4- or 8-bit codes with `scales` bf16/fp16/fp32 [rows, groups].
    bits, columns: of integer codes. group: columns that share a scale (a block's side for e4m3).

    Raises ValueError when sizes contradict each other: the caller has checked its files.
    """

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor | None = None,
        *,
        bits: int = 0,
        columns: int = 0,
        group: int = 0,
    ) -> None:
        need(weight.dim() == 2, f"weights have {weight.dim()} dimensions, not 2")
        need(columns >= 0, f"{columns} columns")
        rows = weight.shape[0]
        need(weight.device.type == "cpu" and weight.is_contiguous(), "weights must be contiguous, on the CPU")
        scale_code = 0
        if weight.dtype == torch.int32:
            need(bits in (4, 8), f"codes have {bits} bits, not 4 or 8")
            need(weight.shape[1] == words_per_row(columns, bits), "packed width and columns disagree")
            need(scales is not None and group > 0, "integer codes need scales and a group")
            assert scales is not None
            need(tuple(scales.shape) == (rows, -(-columns // group)), "scales are not [rows, groups]")
            need(scales.dtype in FLOAT_CODES, f"scales are {scales.dtype}")
            code, scale_code = bits, FLOAT_CODES[scales.dtype]
        elif weight.dtype == torch.float8_e4m3fn:
            columns = weight.shape[1]
            need(scales is not None and group > 0 and group % 16 == 0, "e4m3 needs scales and whole blocks")
            assert scales is not None
            wanted = (-(-rows // group), -(-columns // group))
            need(tuple(scales.shape) == wanted and scales.dtype == torch.float32, "block scales are wrong")
            code, scale_code = _E4M3, 32
        else:
            need(weight.dtype in FLOAT_CODES, f"weights are {weight.dtype}")
            columns, code, group = weight.shape[1], FLOAT_CODES[weight.dtype], 0
        if scales is not None:
            need(scales.device.type == "cpu" and scales.is_contiguous(), "scales must be contiguous")
        self.weight, self.scales = weight, scales
        self.rows, self.columns, self.bits = rows, columns, bits if weight.dtype == torch.int32 else 0
        self.group = group
        self.handle = library.Matrix(
            code,
            rows,
            columns,
            group,
            weight.data_ptr(),
            scale_code,
            0 if scales is None else scales.data_ptr(),
        )

    @property
    def block(self) -> int:
        """Columns whose activations share an int8 scale; 0 = this matrix takes float activations."""
        return self.handle.block

    @property
    def num_bytes(self) -> int:
        """Bytes that one product with it reads."""
        scales = 0 if self.scales is None else self.scales.numel() * self.scales.element_size()
        return self.weight.numel() * self.weight.element_size() + scales


class Vector:
    """Norm weights or biases: bf16, fp16 or fp32, contiguous on the CPU, read where they lie at each call."""

    def __init__(self, values: Tensor) -> None:
        values = values.detach()
        fits = values.dtype in FLOAT_CODES and values.is_contiguous() and values.device.type == "cpu"
        need(fits, f"a vector is {values.dtype} on {values.device}; it must be contiguous floats on the CPU")
        self.values = values
        self.handle = library.Vector(values.data_ptr(), FLOAT_CODES[values.dtype], values.numel())


def linear(
    x: Tensor,
    matrix: Matrix,
    *,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    exact: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """W norm(x) + bias + add; x [..., columns] fp32 or bf16, the result [..., rows] in `dtype` (x's).

    bias: fp32 [rows]. add: like the result. norm: fp32 [columns], weights of an RMSNorm taken first.
    exact: integer weights meet unrounded activations. A row's result does not depend on the rows beside it.
    """
    x = activations(x, matrix.columns)
    dtype = dtype or x.dtype
    need(dtype in ACTIVATIONS, f"results are {dtype}, not fp32 or bf16")
    out = torch.empty(*x.shape[:-1], matrix.rows, dtype=dtype)
    if add is not None:
        like = add.shape == out.shape and add.dtype == dtype and add.is_contiguous()
        need(like and add.device.type == "cpu", "add must be like the result, on the CPU")
    call = library.LinearCall()
    call.x, call.x_bf16, call.count = x.data_ptr(), x.dtype == torch.bfloat16, x.numel() // matrix.columns
    call.norm, call.eps, call.exact = address(floats(norm, matrix.columns, "norm")), eps, exact
    output = library.LinearOutput()
    output.bias, output.add = address(floats(bias, matrix.rows, "bias")), address(add)
    output.out, output.stride, output.bf16 = out.data_ptr(), matrix.rows, dtype == torch.bfloat16
    library.linear(call, output, matrix.handle)
    return out


def take_rows(ids: Tensor, matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """Rows of a matrix by their numbers, [..., columns] in `dtype` (fp32 or bf16): code times scale, rounded
    once.

    ids: integers on the CPU. Raises IndexError for a number that is no row's.
    """
    need(not ids.is_floating_point() and ids.device.type == "cpu", f"ids are {ids.dtype} on {ids.device}")
    need(dtype in ACTIVATIONS, f"results are {dtype}, not fp32 or bf16")
    ids = ids.to(torch.int64).contiguous()
    out = torch.empty(*ids.shape, matrix.columns, dtype=dtype)
    library.take_rows(matrix.handle, ids.data_ptr(), out.data_ptr(), dtype == torch.bfloat16, ids.numel())
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, like x (fp32 or bf16).

    weight: fp32 [D]. In bf16 the normalized value is rounded before the weight is applied, as `RMSNorm`
    does it. A row's result does not depend on the rows beside it.
    """
    columns = weight.numel()
    x = activations(x, columns)
    out = torch.empty_like(x)
    call = fill(
        library.NormCall(), x=x, out=out, weight=floats(weight, columns, "norm weights"), eps=eps,
        bf16=x.dtype == torch.bfloat16, count=x.numel() // columns, cols=columns,
    )  # fmt: skip
    library.norm_rows(call)
    return out
