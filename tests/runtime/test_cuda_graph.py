"""A steady step gives what the ordinary step gives, and leaves an ordinary cache behind.

On a machine without a GPU the step runs as plain calls: the recording itself is not tested there.
"""

from __future__ import annotations

import pytest
import torch

from glm5.config import MODEL_TYPES
from glm5.errors import RequestError
from glm5.runtime.cache import Cache
from glm5.runtime.cuda_graph import GraphedStep
from tests.kernels.cuda.cuda_fixture import DEVICE
from tests.model_fixture import random_ids, tiny_config, tiny_model


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_steps_are_the_ordinary_ones(model_type: str, padded: bool) -> None:
    model = tiny_model(tiny_config(model_type)).to(DEVICE)
    mask = torch.ones(2, 20, dtype=torch.bool, device=DEVICE)
    mask[1, :5] = not padded
    ordinary, steady = (Cache(model.config, 2, 40, dtype=torch.float32, device=DEVICE) for _ in range(2))
    for layer in steady.layers:  # what memory may hold that nobody has written yet
        for buffer in vars(layer).values():
            if isinstance(buffer, torch.Tensor):
                buffer.fill_(float("nan"))
    with torch.inference_mode():
        for cache in (ordinary, steady):
            model(random_ids(2, 20).to(DEVICE), attention_mask=mask if padded else None, cache=cache)
        step = GraphedStep(model, steady)
        for number in range(4):
            ids = random_ids(2, 1, seed=number).to(DEVICE)
            wanted = model(ids, cache=ordinary, logits_to_keep=1).logits
            assert torch.allclose(step(ids), wanted, atol=1e-4)
        # Either cache goes on in the ordinary way.
        ids = random_ids(2, 3, seed=9).to(DEVICE)
        assert torch.allclose(model(ids, cache=steady).logits, model(ids, cache=ordinary).logits, atol=1e-4)


def test_a_cache_may_be_cut_between_steps() -> None:
    model = tiny_model().to(DEVICE)
    cache = Cache(model.config, 1, 20, dtype=torch.float32, device=DEVICE)
    with torch.inference_mode():
        model(random_ids(1, 10).to(DEVICE), cache=cache)
        step, ids = GraphedStep(model, cache), random_ids(1, 1, seed=1).to(DEVICE)
        first = step(ids).clone()
        step(random_ids(1, 1, seed=2).to(DEVICE))
        cache.truncate(10)
        assert torch.equal(step(ids), first)


def test_a_full_cache_is_refused() -> None:
    model = tiny_model().to(DEVICE)
    cache = Cache(model.config, 1, 4, dtype=torch.float32, device=DEVICE)
    with torch.inference_mode():
        model(random_ids(1, 3).to(DEVICE), cache=cache)
        step, ids = GraphedStep(model, cache), random_ids(1, 1).to(DEVICE)
        step(ids)
        with pytest.raises(RequestError, match="holds 4 tokens"):
            step(ids)
        with pytest.raises(RequestError, match="full"):
            GraphedStep(model, cache)
