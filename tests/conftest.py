"""Hypothesis looks for new examples on a developer's machine and repeats the same ones in CI.

GLM5_NATIVE_MODULE names another build of the native library (the one with sanitizers) to test.
"""

from __future__ import annotations

import importlib.util
import os
import sys

from hypothesis import settings

settings.register_profile("ci", derandomize=True, print_blob=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

if native := os.environ.get("GLM5_NATIVE_MODULE"):
    import glm5.kernels

    spec = importlib.util.spec_from_file_location("glm5.kernels._cpu", native)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["glm5.kernels._cpu"] = module
    setattr(glm5.kernels, "_cpu", module)  # noqa: B010
