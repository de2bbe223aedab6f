"""A tiny model with its tokenizer, as an object and as a directory on disk."""

from __future__ import annotations

from typing import Any

import torch

from glm5.runtime.language_model import LanguageModel
from tests.model_fixture import tiny_config
from tests.text.tokenizer_fixture import small_tokenizer


def tiny_language_model(**changes: Any) -> LanguageModel:
    tokenizer = small_tokenizer()
    sizes = {"vocab_size": tokenizer.vocab_size, "eos_token_id": list(tokenizer.eos_token_ids)}
    model = LanguageModel(tiny_config(**sizes, pad_token_id=tokenizer.pad_token_id, **changes))
    model.reset_parameters(torch.Generator().manual_seed(0))
    model.tokenizer = tokenizer
    return model.eval()
