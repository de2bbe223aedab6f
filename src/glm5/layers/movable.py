"""What native modules keep beside their weights, and when it is made anew.

A native module computes from the memory that its parameters and buffers have. Values may change there at
any time. Where a parameter, buffer or module is assigned, or the model is moved, cast, copied or pickled,
handles are made again. Nobody hears of `parameter.data = ...`, of tensors put in by
`torch.func.functional_call`, and of `.to()` on a router or LayerNorm by itself: move the model, or its
decoder layer.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

NATIVE = (torch.float32, torch.bfloat16)


def runs_natively(x: Tensor) -> bool:
    """Do the CPU kernels take these activations? Not with gradients, and not while torch compiles."""
    native = x.device.type == "cpu" and x.dtype in NATIVE and not torch.is_grad_enabled()
    return native and not torch.compiler.is_compiling()


class _Epoch:
    """Counts the replacements of parameters, buffers and modules anywhere: cheap to ask before each call."""

    count = 0
    listening = False

    @classmethod
    def pass_on(cls, *_: Any) -> None:
        cls.count += 1

    @classmethod
    def listen(cls) -> None:
        if not cls.listening:
            cls.listening = True
            hooks.register_module_parameter_registration_hook(cls.pass_on)
            hooks.register_module_buffer_registration_hook(cls.pass_on)
            hooks.register_module_module_registration_hook(cls.pass_on)


def _outside_of_compilers(forward: Any) -> Any:
    """A compiler would trace PyTorch's own products, whose sums are others: its graph breaks here instead."""

    @wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(forward)(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    return run


class Movable(nn.Module):
    """A module that keeps handles of native memory, and forgets them when that memory may have changed."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "forward" in vars(cls):
            cls.forward = _outside_of_compilers(vars(cls)["forward"])

    def kept(self, name: str, make: Any) -> Any:
        """The handle `name`, made by `make()` when there is none of now."""
        handles: tuple[int, dict[str, Any]] | None = self.__dict__.get("_handles")
        if not _Epoch.listening:
            _Epoch.listen()
        if handles is None or handles[0] != _Epoch.count:
            handles = self.__dict__["_handles"] = (_Epoch.count, {})
        found = handles[1].get(name)
        if found is None:
            found = handles[1][name] = make()
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        _Epoch.pass_on()
        return result

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if value is None:  # torch tells its hooks of tensors only
            _Epoch.pass_on()

    def __getstate__(self) -> dict[str, Any]:
        _Epoch.pass_on()  # pickling for another process moves the memory
        return {name: value for name, value in self.__dict__.items() if name != "_handles"}
