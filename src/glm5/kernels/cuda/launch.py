"""What every launch needs: the right device, and whether this is Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)
F = TypeVar("F", bound=Callable[..., Any])


def on_its_device(function: F) -> F:
    """Launch on the GPU that holds the first argument; Triton takes the current one."""

    @wraps(function)
    def call(x: Tensor, *args: Any, **options: Any) -> Any:
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return function(x, *args, **options)
        with torch.cuda.device(x.device):
            return function(x, *args, **options)

    return cast(F, call)


def product_type(dtype: torch.dtype) -> Any:
    """In what `tl.dot` multiplies activations of this dtype. The interpreter has no 16-bit arithmetic."""
    if triton.knobs.runtime.interpret:
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


def ceil_div(number: int, by: int) -> int:
    return -(-number // by)


def next_power(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


def need(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
