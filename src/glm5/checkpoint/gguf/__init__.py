"""GGUF files, the single-file checkpoints of llama.cpp: read-only, checked, a tensor at a time.

`GgufFile` is any such file (or split set), `GgufModel` one that holds a GLM, under the names of its
Hugging Face checkpoint; `tokenizer_files` rebuilds the tokenizer it carries.
"""

from __future__ import annotations

from glm5.checkpoint.gguf.file import GgufFile
from glm5.checkpoint.gguf.model import GgufModel
from glm5.checkpoint.gguf.vocabulary import tokenizer_files

__all__ = ["GgufFile", "GgufModel", "tokenizer_files"]
