"""GLM-5-family sparse language models on the machines you have.

    import glm5

    model = glm5.load()                       # the embedded model; or a directory, or a hub name
    for piece in model.stream("你好"):
        print(piece, end="", flush=True)

Names are imported when they are first used, so that `import glm5` does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glm5.config import ModelConfig
    from glm5.errors import Glm5Error
    from glm5.hub import AutoModelForCausalLM, AutoTokenizer, load
    from glm5.runtime.language_model import LanguageModel
    from glm5.runtime.request import Result
    from glm5.runtime.sampling_params import SamplingParams

__version__ = "0.1.0"

_WHERE = {
    "AutoModelForCausalLM": "glm5.hub",
    "AutoTokenizer": "glm5.hub",
    "load": "glm5.hub",
    "ModelConfig": "glm5.config",
    "Glm5Error": "glm5.errors",
    "Result": "glm5.runtime.request",
    "LanguageModel": "glm5.runtime.language_model",
    "SamplingParams": "glm5.runtime.sampling_params",
}

__all__ = [
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "Glm5Error",
    "LanguageModel",
    "ModelConfig",
    "Result",
    "SamplingParams",
    "__version__",
    "generate",
    "load",
]


def generate(prompt: str, model: LanguageModel | str | None = None, **options: Any) -> str:
    """Continue `prompt` with a loaded model, a path or (None) the embedded model; returns text.

    For more than one call load the model once: `glm5.load(path).complete(prompt)`.
    """
    from glm5.hub import load as load_model

    loaded = load_model(model) if model is None or isinstance(model, str) else model
    return loaded.complete(prompt, **options).text or ""


def __getattr__(name: str) -> Any:
    import importlib

    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'glm5' has no attribute {name!r}")
