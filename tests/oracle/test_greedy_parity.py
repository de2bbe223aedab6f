"""Our greedy text against `generate` of `transformers` 5.24, from one directory on disk.

32 index heads, so that no two index scores tie, and the latent eps that transformers has hard-wired.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from glm5.runtime.language_model import LanguageModel
from tests.model_fixture import random_ids, tiny_config

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

NEW = 16
Pair = tuple[LanguageModel, PreTrainedModel]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The same random weights, written by us and read by both."""
    directory = tmp_path_factory.mktemp("greedy")
    config = tiny_config(index_n_heads=32, latent_norm_eps=1e-6, eos_token_id=[3, 5], pad_token_id=0)
    model = LanguageModel(config)
    model.reset_parameters(torch.Generator().manual_seed(0))
    model.save_pretrained(directory)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return LanguageModel.load(directory), theirs


@pytest.mark.parametrize("length", [1, 5, 8, 9, 23])
def test_greedy_ids_are_those_of_transformers(pair: Pair, length: int) -> None:
    """Prompts below, at and past `index_topk` = 8; the answer always gets past it."""
    ours, theirs = pair
    ids = random_ids(1, length, seed=length)
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(ours.generate(ids, max_new_tokens=NEW), expected)
    assert torch.equal(ours.generate(ids, max_new_tokens=NEW), expected)
    assert torch.equal(ours.generate(ids, max_new_tokens=NEW, use_mtp=True, num_draft_tokens=3), expected)
