"""A decoder layer in one call, against the modules that it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from glm5.config import ModelConfig
from glm5.formats.packing import pack
from glm5.layers.fused_layer import FEW_TOKENS, NativeDecoderLayer, NativeMTPLayer
from glm5.layers.packed import PackedExperts, PackedLinear, Scheme
from glm5.layers.selection import SlotSelection
from glm5.layers.swap import pack_modules, place_modules
from glm5.model.masks import visibility
from glm5.model.transformer import GlmForCausalLM, token_places
from glm5.runtime.cache import Cache
from tests.kernels.kernel_fixture import instruction_set as instruction_set
from tests.kernels.kernel_fixture import on_threads

DSA = ModelConfig(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=4, first_k_dense_replace=1,
    num_attention_heads=3, num_key_value_heads=3, q_lora_rank=32, kv_lora_rank=48, qk_nope_head_dim=16,
    qk_rope_head_dim=16, v_head_dim=32, index_n_heads=4, index_head_dim=32, index_topk=12,
    indexer_types=("full", "full", "shared", "full"), n_routed_experts=8, num_experts_per_tok=2,
    moe_intermediate_size=32, n_shared_experts=1, num_nextn_predict_layers=1, eos_token_id=0,
    max_position_embeddings=128,
)  # fmt: skip
LITE = ModelConfig(
    model_type="glm4_moe_lite", vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=32,
    qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=8, num_experts_per_tok=2,
    moe_intermediate_size=32, n_shared_experts=1, num_nextn_predict_layers=0, eos_token_id=0,
    max_position_embeddings=128, attention_bias=True,
)  # fmt: skip


def packed_model(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> GlmForCausalLM:
    generator = torch.Generator().manual_seed(seed)
    model = GlmForCausalLM(config)
    pack_modules(model, lambda name: None if name.rpartition(".")[2] == "gate" else Scheme(4, 32))
    model.to(dtype)
    place_modules(model, torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1, generator=generator)
        for module in model.modules():
            if isinstance(module, PackedLinear):
                _fill(module.words, module.scales, module.in_features, generator)
            elif isinstance(module, PackedExperts):
                for expert in range(module.num_experts):
                    for projection in ("gate_proj", "up_proj", "down_proj"):
                        packed = module.packed(expert, projection)
                        _fill(*packed, module.shape(projection)[1], generator)
    return model.eval()


def _fill(words: Tensor, scales: Tensor, columns: int, generator: torch.Generator) -> None:
    codes = torch.randint(-8, 8, (words.shape[0], columns), generator=generator)
    words.copy_(pack(codes.to(torch.int8), 4))
    scales.copy_(torch.rand(scales.shape, generator=generator) * 0.03 + 0.02)


@contextmanager
def by_modules() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeDecoderLayer, "_applies", lambda *_: False)
        yield


def layers_differ(
    model: GlmForCausalLM,
    held: int,
    tokens: int,
    padding: int = 0,
    batch: int = 2,
) -> list[float]:
    """Largest difference of each layer's result, on the same inputs, relative to the result's size."""
    ids = torch.randint(0, 96, (batch, held + tokens), generator=torch.Generator().manual_seed(held))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    caches = [Cache(model.config, batch, held + tokens + 3, dtype=model.dtype) for _ in range(2)]
    found = []
    with torch.inference_mode():
        for cache in caches:
            model(ids[:, :held], attention_mask=mask[:, :held], cache=cache)
        for cache in caches:
            places = token_places(ids[:, held:], mask, cache=cache)
            visible = visibility(places, cache.append_places(places))
        angles, x = model.angles(places.positions), model.model.embed_tokens(ids[:, held:])
        chosen = plain_chosen = None
        for index, layer in enumerate(model.model.layers):
            native, chosen = layer(x, angles, visible, caches[0].layers[index], chosen)
            with by_modules():
                plain, plain_chosen = layer(x, angles, visible, caches[1].layers[index], plain_chosen)
            assert native.dtype == plain.dtype
            found.append(float((native - plain).abs().max() / plain.abs().max()))
            assert (chosen is None) == (plain_chosen is None)
            if chosen is not None:
                assert isinstance(chosen, SlotSelection)
                assert torch.equal(chosen.mask_BTS, plain_chosen.mask_BTS)
            x = plain
    return found


@pytest.mark.parametrize("config", [DSA, LITE], ids=["dsa", "lite"])
@pytest.mark.parametrize(
    ("held", "tokens", "padding"), [(7, 1, 0), (30, 1, 0), (30, 3, 0), (30, 2, 5), (1, 4, 0)]
)
def test_it_is_the_modules_in_one_call(
    config: ModelConfig, held: int, tokens: int, padding: int, instruction_set: str,
) -> None:  # fmt: skip
    model = packed_model(config)
    assert all(isinstance(layer, NativeDecoderLayer) for layer in model.model.layers)
    assert max(layers_differ(model, held, tokens, padding)) < 2e-5


def test_sixteen_bits_differ_by_their_rounding() -> None:
    model = packed_model(DSA, torch.bfloat16)
    assert max(layers_differ(model, 9, 2)) < 5e-2


def decode(model: GlmForCausalLM, ids: Tensor, steps: list[int], held: int) -> Tensor:
    with torch.inference_mode():
        cache, out = Cache(model.config, len(ids), ids.shape[1], dtype=model.dtype), []
        model(ids[:, :held], cache=cache)
        for count in steps:
            at = cache.length
            out.append(model(ids[:, at : at + count], cache=cache).logits)
        return torch.cat(out, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_batch_nor_chunks_nor_threads_change_a_bit(dtype: torch.dtype) -> None:
    model = packed_model(DSA, dtype)
    ids = torch.randint(0, 96, (3, 40), generator=torch.Generator().manual_seed(1))
    one = decode(model, ids[1:2], [1] * 16, 24)
    assert torch.equal(decode(model, ids[1:2], [5, 1, 7, 3], 24), one)
    with on_threads(3):
        assert torch.equal(decode(model, ids[1:2], [4] * 4, 24), one)


def test_mtp_layers_are_native_too() -> None:
    model = packed_model(DSA)
    (layer,) = model.mtp_layers()
    assert isinstance(layer, NativeMTPLayer)
    hidden, embedded = torch.randn(2, 1, 1, 64, generator=torch.Generator().manual_seed(2))
    results = []
    for native in (True, False):
        cache = Cache(model.config, 1, 8, dtype=model.dtype, layers=range(4, 5))
        with torch.inference_mode():
            places = token_places(torch.tensor([[1]]), cache=cache)
            visible, angles = visibility(places, cache.append_places(places)), model.angles(places.positions)
            if native:
                results.append(layer.draft(hidden, embedded, angles, visible, cache.layers[0]))
            else:
                with by_modules():
                    results.append(layer.draft(hidden, embedded, angles, visible, cache.layers[0]))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


def test_routing_is_recorded_by_the_modules() -> None:
    model = packed_model(DSA)
    mixture = model.moe_layers()[0]
    mixture.record_routing = True
    decode(model, torch.arange(6).view(1, -1), [1], 5)
    assert mixture.last_routing is not None and mixture.last_routing.topk_ids_TK.shape == (1, 2)


def test_a_full_cache_is_refused_before_it_is_written() -> None:
    model = packed_model(DSA)
    cache = Cache(model.config, 1, 4, dtype=model.dtype)
    with torch.inference_mode(), pytest.raises(Exception, match="the cache holds 4 tokens"):
        model(torch.arange(5).view(1, -1), cache=cache)
    assert FEW_TOKENS >= 4
