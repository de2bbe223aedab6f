"""The compiled library itself, and how its calls are filled and checked. Only this folder imports it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm5.errors import NativeModuleError

try:
    from glm5.kernels import _cpu as library  # type: ignore[attr-defined]  # compiled from src/
except ImportError as error:
    raise NativeModuleError(
        f"the native module glm5.kernels._cpu is missing or does not load ({error}); "
        "run `pip install .` in the checkout with a C++ compiler at hand"
    ) from None

FLOAT_CODES = {torch.bfloat16: 16, torch.float16: 17, torch.float32: 32}
ACTIVATIONS = (torch.float32, torch.bfloat16)


def need(condition: bool, otherwise: str) -> None:
    """Raise ValueError: the caller has checked its files, so this is a mistake in the program."""
    if not condition:
        raise ValueError(otherwise)


def fill(call: Any, **fields: Any) -> Any:
    """Set fields of a call by name; tensors as their addresses, None as no address."""
    for name, value in fields.items():
        setattr(call, name, address(value) if value is None or isinstance(value, Tensor) else value)
    return call


def here(tensor: Tensor, name: str) -> Tensor:
    """A tensor on the CPU."""
    need(tensor.device.type == "cpu", f"{name} are on {tensor.device}, not on the CPU")
    return tensor


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def activations(x: Tensor, columns: int) -> Tensor:
    """`x` contiguous, once it is known to be fp32 or bf16 [..., columns] on the CPU."""
    need(x.dtype in ACTIVATIONS and x.device.type == "cpu", f"activations are {x.dtype}, not fp32 or bf16")
    fits = x.dim() > 0 and columns > 0 and x.shape[-1] == columns
    need(fits, f"activations are {list(x.shape)}, the weights {columns} wide")
    return x.contiguous()


def floats(values: Tensor | None, count: int, name: str) -> Tensor | None:
    """An fp32 vector of `count` values, or None."""
    if values is not None:
        fits = values.dtype == torch.float32 and values.numel() == count and values.is_contiguous()
        need(fits and values.device.type == "cpu", f"{name} must be fp32 [{count}], contiguous, on the CPU")
    return values


def whole(values: Tensor, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
    """A contiguous CPU tensor of this shape and dtype."""
    fits = tuple(values.shape) == shape and values.dtype == dtype and values.device.type == "cpu"
    need(fits and values.is_contiguous(), f"{name} must be {dtype} {list(shape)}, contiguous, on the CPU")
    return values


def inside(values: Tensor, low: int, high: int, name: str) -> None:
    """Every integer of a tensor lies in [low, high)."""
    if values.numel():
        least, most = int(values.min()), int(values.max())
        need(low <= least and most < high, f"{name} go from {least} to {most}, outside {low}..{high - 1}")


def instruction_sets() -> list[str]:
    """What this machine can run, best first; the environment's GLM5_ISA picks another."""
    return list(library.instruction_sets())


def instruction_set() -> str:
    """The set in use. Raises RuntimeError when GLM5_ISA names one that this machine has not."""
    return str(library.instruction_set())


def set_threads(count: int) -> None:
    """Threads of the kernels, the caller's among them; results do not depend on it."""
    library.set_threads(count)


def threads() -> int:
    return int(library.threads())


library.set_threads(torch.get_num_threads())
