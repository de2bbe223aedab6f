"""A decoder layer in one call, against the modules that it is made of."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from glm5.formats.packed import Scheme
from glm5.layers.fused_layer import FusedLayer
from glm5.layers.packed import PackedExperts
from glm5.layers.selection import SlotSelection
from glm5.model.layer import DecoderLayer
from glm5.model.routing import Routing
from glm5.model.step import Probe
from glm5.model.transformer import GlmForCausalLM
from glm5.runtime.cache import Cache
from tests.kernels.kernel_fixture import instruction_set as instruction_set
from tests.layers.layer_fixture import KINDS, config_of, native_model
from tests.model_fixture import random_ids
from tests.quantize.quantize_fixture import exact_kernels as exact_kernels


def layers_differ(model: GlmForCausalLM, held: int, tokens: int, fewer: int = 0) -> list[float]:
    """Largest difference of each layer's result, on the same inputs, relative to the result's size.

    Two sequences; the first holds `fewer` tokens less.
    """
    ids = random_ids(2, held + tokens, seed=held)
    caches = [Cache(model.config, 2, held + tokens + 3, dtype=model.dtype) for _ in range(2)]
    found = []
    with torch.inference_mode():
        steps = []
        for cache in caches:
            model.extend(torch.cat((ids[0, fewer:held], ids[1, :held])), cache.coming([held - fewer, held]))
            steps.append(model.cached_step(cache.coming([tokens, tokens])))
        x = model.model.embed_tokens(ids[:, held:].reshape(1, -1))
        chosen = plain_chosen = None
        for layer in model.model.layers:
            native, chosen = layer(x, steps[0], chosen)
            plain, plain_chosen = DecoderLayer.forward(layer, x, steps[1], plain_chosen)
            assert native.dtype == plain.dtype
            found.append(float((native - plain).abs().max() / plain.abs().max()))
            assert (chosen is None) == (plain_chosen is None)
            if chosen is not None:
                assert isinstance(chosen, SlotSelection)
                for number, part in enumerate(steps[0].parts):
                    own, plain_own = chosen.of(number, part), plain_chosen.of(number, part)
                    assert torch.equal(own.mask_BTS, plain_own.mask_BTS)
            x = plain
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", [None, Scheme(4, 32)], ids=["floats", "int4"])
@pytest.mark.parametrize(
    ("held", "tokens", "fewer"), [(7, 1, 0), (30, 3, 0), (30, 2, 25), (1, 40, 0), (2, 19, 1)]
)
def test_it_is_the_modules_in_one_call(
    kind: str, scheme: Scheme | None, held: int, tokens: int, fewer: int, instruction_set: str,
    exact_kernels: None,
) -> None:  # fmt: skip
    model = native_model(config_of(kind), scheme)
    assert all(isinstance(layer, FusedLayer) for layer in model.model.layers)
    assert max(layers_differ(model, held, tokens, fewer)) < 1e-4


def test_sixteen_bits_differ_by_their_rounding(exact_kernels: None) -> None:
    model = native_model(config_of("dsa"), Scheme(4, 32), torch.bfloat16)
    assert max(layers_differ(model, 9, 2)) < 5e-2


@pytest.mark.parametrize("kind", KINDS)
def test_mtp_layers_are_native_too(kind: str) -> None:
    model = native_model(config_of(kind, num_nextn_predict_layers=1))
    (draft,) = model.mtp_layers()
    assert isinstance(draft.layer, FusedLayer)
    hidden, embedded = torch.randn(2, 1, 3, 64, generator=torch.Generator().manual_seed(2))
    results = []
    for plain in (False, True):
        layer = model.config.num_hidden_layers
        cache = Cache(model.config, 1, 8, dtype=model.dtype, layers=range(layer, layer + 1))
        with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
            if plain:
                patch.setattr(FusedLayer, "forward", DecoderLayer.forward)
            step = model.cached_step(cache.coming([3]))
            results.append(draft(hidden, embedded, step))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


class Ear(Probe):
    """Keeps all that it is told."""

    def __init__(self) -> None:
        self.heard: dict[tuple[str, int], Any] = {}

    def attention_input(self, layer: int, x_BTD: Tensor) -> None:
        self.heard["attention_input", layer] = x_BTD

    def routing(self, layer: int, routing: Routing) -> None:
        self.heard["routing", layer] = routing

    def hidden(self, layer: int, x_BTD: Tensor) -> None:
        self.heard["hidden", layer] = x_BTD


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 23])
def test_a_probe_hears_the_same_of_every_implementation(kind: str, tokens: int) -> None:
    model, ids = native_model(config_of(kind)), random_ids(2, tokens)
    heard = []
    for plain in (False, True):
        ear = Ear()
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            if plain:
                patch.setattr(FusedLayer, "forward", DecoderLayer.forward)
            model(ids, probe=ear)
        heard.append(ear.heard)
    native, plain_heard = heard
    assert native.keys() == plain_heard.keys()
    assert sum(what == "routing" for what, _ in native) == model.config.num_sparse_layers
    for key, value in native.items():
        wanted = plain_heard[key]
        if key[0] == "routing":
            assert torch.equal(value.topk_ids_TK, wanted.topk_ids_TK)
            torch.testing.assert_close(value.topk_weights_TK, wanted.topk_weights_TK, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(value.scores_TE, wanted.scores_TE, atol=1e-4, rtol=1e-3)
        else:
            torch.testing.assert_close(value, wanted, atol=1e-3, rtol=1e-3)


def test_watching_changes_no_bit() -> None:
    model, ids = native_model(config_of("dsa"), Scheme(4, 32)), random_ids(2, 20)
    with torch.no_grad():
        assert torch.equal(model(ids, probe=Ear()).logits, model(ids).logits)


class Elsewhere(torch.nn.Module):
    """A bank that the library does not hold, such as one in tiers."""

    def __init__(self, bank: torch.nn.Module) -> None:
        super().__init__()
        self.bank = bank

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        assert x_TD.dtype == torch.float32
        out: Tensor = self.bank(x_TD, topk_ids_TK, topk_weights_TK)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", [None, Scheme(4, 32)], ids=["floats", "int4"])
def test_a_bank_behind_its_own_call_gives_the_same_bits(scheme: Scheme | None, dtype: torch.dtype) -> None:
    model, ids = native_model(config_of("dsa"), scheme, dtype), random_ids(2, 20)
    ear, parted_ear = Ear(), Ear()
    with torch.no_grad():
        wanted = model(ids, probe=ear).logits
        for layer in model.moe_layers():
            layer.experts = Elsewhere(layer.experts)  # type: ignore[assignment]
        assert torch.equal(model(ids, probe=parted_ear).logits, wanted)
    for key, value in ear.heard.items():
        if key[0] == "routing":
            assert all(map(torch.equal, value, parted_ear.heard[key]))


# --- weights that change ------------------------------------------------------------------------------


def logits(model: GlmForCausalLM) -> Tensor:
    with torch.no_grad():
        return model(random_ids(1, 12)).logits


def plain_logits(model: GlmForCausalLM) -> Tensor:
    """The same weights in the modules of the paper."""
    plain = GlmForCausalLM(model.config).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    return logits(plain.eval())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_may_change_where_they_lie(kind: str) -> None:
    model = native_model(config_of(kind))
    before = logits(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        for layer in model.moe_layers():
            layer.gate.e_score_correction_bias.add_(torch.arange(8) * 0.1)
    torch.testing.assert_close(logits(model), plain_logits(model), atol=2e-4, rtol=1e-3)
    assert not torch.allclose(logits(model), before, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_may_be_replaced(kind: str) -> None:
    model = native_model(config_of(kind))
    logits(model)
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(parameter.detach() * 1.1))
    torch.testing.assert_close(logits(model), plain_logits(model), atol=2e-4, rtol=1e-3)
    other = native_model(config_of(kind), seed=5)
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model), logits(other))
    model.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(logits(model), logits(other))


def test_a_replaced_module_is_used() -> None:
    model = native_model(config_of("gqa"))
    before = logits(model)
    layer: Any = model.model.layers[0]
    layer.self_attn.o_proj = type(layer.self_attn.o_proj)(torch.nn.Linear(96, 64, bias=False))
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("scheme", [None, Scheme(4, 32)], ids=["floats", "int4"])
def test_a_model_is_copied_pickled_and_cast(scheme: Scheme | None) -> None:
    model = native_model(config_of("dsa"), scheme)
    wanted = logits(model)
    kept = io.BytesIO()
    pickle.dump(model, kept)
    kept.seek(0)
    for other in (copy.deepcopy(model), pickle.load(kept)):
        assert torch.equal(logits(other), wanted)
        with torch.no_grad():
            other.model.norm.weight.mul_(2)
            for module in other.modules():
                if isinstance(module, PackedExperts):
                    module.bytes.zero_()
        assert not torch.equal(logits(other), wanted)
        assert torch.equal(logits(model), wanted)
    half = copy.deepcopy(model).bfloat16()
    found = logits(half)
    assert found.dtype == torch.bfloat16 and found.isfinite().all() and not torch.equal(found.float(), wanted)


def test_gradients_pass_and_compiling_is_right() -> None:
    model, ids = native_model(config_of("gqa")), random_ids(1, 9)
    model(ids).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.model.layers[0].parameters())
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_model_gives_the_same_bits(dtype: torch.dtype) -> None:
    ids = random_ids(1, 9)
    for scheme in (None, Scheme(4, 32)):
        model = native_model(config_of("dsa"), scheme, dtype)
        with torch.no_grad():
            wanted = model(ids).logits
            compiled = torch.compile(model, backend="eager")
            assert torch.equal(compiled(ids).logits, wanted)
            assert torch.equal(compiled(ids).logits, wanted)
        torch._dynamo.reset()


def test_the_state_of_a_packed_model_is_whole() -> None:
    one, other = (native_model(config_of("dsa"), Scheme(4, 32), seed=seed) for seed in (0, 1))
    ids = random_ids(1, 9)
    with torch.inference_mode():
        wanted = one(ids).logits
        assert not torch.equal(other(ids).logits, wanted)
        other.load_state_dict(one.state_dict())
        assert torch.equal(other(ids).logits, wanted)
    with torch.no_grad():
        held = sum(v.numel() * v.element_size() for v in one.state_dict().values())
    assert held >= sum(bank.bytes.numel() for bank in one.modules() if isinstance(bank, PackedExperts))
    assert any(name.endswith(".words") for name in one.state_dict())


def test_a_full_cache_is_refused_before_it_is_written() -> None:
    model = native_model(config_of("dsa"))
    cache = Cache(model.config, 1, 4, dtype=model.dtype)
    with torch.inference_mode(), pytest.raises(Exception, match="the cache holds 4 tokens"):
        model(torch.arange(5).view(1, -1), cache=cache)
