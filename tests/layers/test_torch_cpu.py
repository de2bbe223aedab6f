"""The linear layer is nn.Linear, whichever product it takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from glm5.layers.torch_cpu import Linear
from glm5.model import linear


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=2),
    st.integers(1, 70),
    st.integers(1, 70),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
)
def test_it_gives_what_nn_linear_gives(
    outer: list[int], inside: int, outside: int, bias: bool, dtype: torch.dtype, gradients: bool
) -> None:
    ours = Linear(inside, outside, bias=bias).to(dtype)
    theirs = nn.Linear(inside, outside, bias=bias).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(*outer, inside, generator=torch.Generator().manual_seed(inside)).to(dtype)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (3, 40)])
def test_a_large_matrix_split_among_threads_is_the_same(threads: int, shape: tuple[int, int]) -> None:
    layer = Linear(256, 4098, bias=False)
    x = torch.randn(*shape, 256)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            out = layer(x)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(out, x @ layer.weight.detach().T, atol=1e-4, rtol=1e-4)


def test_strided_inputs_and_weights_that_are_views() -> None:
    layer = Linear(32, 48, bias=False)
    layer.weight = nn.Parameter(torch.randn(96, 32)[::2])
    x = torch.randn(20, 64)[:, ::2]
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), x @ layer.weight.T, atol=1e-5, rtol=1e-5)


def test_without_onednn_the_plain_product_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_onednn_linear", lambda: None)
    layer, x = Linear(8, 8), torch.randn(20, 8)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)
