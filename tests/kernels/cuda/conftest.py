"""The GPU kernels' tests: on the GPU where there is one, else in Triton's interpreter on the CPU.

The interpreter has to be chosen before Triton and the programs are imported. Other tests may have
imported Triton already (by way of compressed-tensors), so a fresh copy is taken, and told to stay what
it is; the variable is put back at once.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest
import torch


def _import_interpreted() -> None:
    for name in [name for name in sys.modules if name == "triton" or name.startswith("triton.")]:
        if not name.startswith("triton._C"):  # the compiled part can be loaded once
            del sys.modules[name]
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        importlib.import_module("triton").knobs.runtime.interpret = True
        for name in ("products", "mixture", "mla", "index"):
            importlib.import_module(f"glm5.kernels.cuda.{name}")
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    _import_interpreted()


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
