"""Hypothesis looks for new examples on a developer's machine and repeats the same ones in CI.

GLM5_NATIVE_MODULE names another build of the native library (the one with sanitizers) to test.
"""

from __future__ import annotations

import importlib.util
import os
import sys

from hypothesis import settings

settings.register_profile("ci", derandomize=True, print_blob=True)
settings.register_profile(
    "few", derandomize=True, max_examples=int(os.environ.get("HYPOTHESIS_MAX_EXAMPLES", 5))
)
if os.environ.get("HYPOTHESIS_MAX_EXAMPLES"):
    settings.load_profile("few")
elif os.environ.get("CI"):
    settings.load_profile("ci")

if native := os.environ.get("GLM5_NATIVE_MODULE"):
    import glm5.kernels

    spec = importlib.util.spec_from_file_location("glm5.kernels._cpu", native)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["glm5.kernels._cpu"] = module
    setattr(glm5.kernels, "_cpu", module)  # noqa: B010
