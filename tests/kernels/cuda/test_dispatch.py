"""A packed model finds the GPU kernels by itself, and answers as with unpacked weights.

Without a GPU its tensors stay on the CPU and are only called GPU tensors.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glm5.checkpoint.filling import Target
from glm5.config import ModelConfig
from glm5.formats.packed import Packed, Scheme
from glm5.kernels import cpu, cuda
from glm5.layers import packed as packed_layers
from glm5.layers import swap as table
from glm5.layers.gpu_layer import GpuLayer
from glm5.layers.packed import PackedLinear
from glm5.model.transformer import GlmForCausalLM
from glm5.runtime.cache import Cache
from tests.kernels.cuda.cuda_fixture import DEVICE, distance, normal, packed_codes
from tests.model_fixture import random_ids, tiny_config, tiny_model

pytest.importorskip("triton", reason="pip install 'glm5[cuda]'")

OPERATIONS = ("linear", "experts", "attend", "select")


def packed_model(config: ModelConfig) -> GlmForCausalLM:
    """A tiny model in int4, its router, indexer and kv_b_proj in floats, as they always are."""
    model = tiny_model(config)
    stay = ("mlp.gate", "indexer", "lm_head", "kv_b_proj", "embed_tokens")
    targets = table.swap(
        model, torch.device("cuda"), lambda name: None if any(s in name for s in stay) else Scheme(4, 32)
    )
    for module in model.modules():
        if isinstance(module, PackedLinear | packed_layers.PackedExperts):
            module.reserve(torch.device("cpu"))
    for number, target in enumerate(targets):
        fill(target, number)
    return model.to(DEVICE)


def fill(target: Target, seed: int) -> None:
    memory = target.memory()
    if isinstance(memory, Packed):
        assert target.scheme is not None
        values = torch.randn(target.shape, generator=torch.Generator().manual_seed(seed)) * 0.1
        rounded = cpu.round_weights(values, bits=4, group=target.scheme.group)
        memory.words.copy_(rounded.words)
        memory.scales.copy_(rounded.scales)


def answers(model: GlmForCausalLM) -> list[Tensor]:
    """A prompt longer than the selection, and a token behind it."""
    cache = Cache(model.config, 1, 16, dtype=torch.float32, device=DEVICE)
    with torch.inference_mode():
        found = [model(random_ids(1, 12).to(DEVICE), cache=cache).logits]
        ids = random_ids(1, 1, seed=1).to(DEVICE)
        return [*found, model(ids, cache=cache).logits]


def test_a_model_runs_on_the_gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(
        num_hidden_layers=2, num_nextn_predict_layers=0, moe_intermediate_size=32, q_lora_rank=64,
        qk_rope_head_dim=16, index_n_heads=16, index_head_dim=32,
    )  # fmt: skip
    model = packed_model(config)
    assert all(isinstance(layer, GpuLayer) for layer in model.model.layers)
    monkeypatch.setattr(packed_layers, "runs_natively", lambda x: False)
    monkeypatch.setattr(cuda, "runs_here", lambda x: False)
    unpacked = answers(model)

    calls = dict.fromkeys(OPERATIONS, 0)

    def counted(name: str) -> None:
        operation = getattr(cuda, name)

        def call(*arguments: object, **options: object) -> object:
            calls[name] += 1
            return operation(*arguments, **options)

        monkeypatch.setattr(cuda, name, call)

    for name in OPERATIONS:
        counted(name)
    monkeypatch.setattr(cuda, "runs_here", lambda x: not torch.is_grad_enabled())
    for found, wanted in zip(answers(model), unpacked, strict=True):
        assert distance(found, wanted) < 2e-5
    assert all(calls.values()), calls


def test_gradients_keep_away_from_the_kernels() -> None:
    x = torch.zeros(1, device=DEVICE)
    with torch.enable_grad():
        assert not cuda.runs_here(x)
    assert cuda.runs_here(x) == x.is_cuda


def test_a_moved_layer_reads_its_new_memory() -> None:
    """What the CPU library holds by address is forgotten when `.to()` moves a module's tensors."""
    layer, x = PackedLinear(64, 9, Scheme(4, 32)), normal(2, 64, seed=1).cpu()
    layer.reserve(torch.device("cpu"))
    words, scales = packed_codes(9, 64, 4, 32, seed=2)
    layer.words.copy_(words)
    layer.scales.copy_(scales)
    before, old = layer(x), layer.words
    layer._apply(torch.clone)
    old.zero_()
    assert torch.equal(layer(x), before)
    assert layer.matrix.weight is layer.words
