"""What a token of the whole network may depend on: prefix, documents, padding, shared selections.

Every sequence is longer than `index_topk`, so that the selection is at work.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad as pad_last

from glm5.config import MODEL_TYPES, ModelConfig
from glm5.model.attention import MultiHeadLatentAttention
from glm5.model.indexer import Selection
from glm5.model.transformer import GlmForCausalLM, token_positions
from tests.model_fixture import random_ids, tiny_config, tiny_configs, tiny_model

quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)
types = pytest.mark.parametrize("model_type", MODEL_TYPES)
MODELS = {model_type: tiny_model(tiny_config(model_type)) for model_type in MODEL_TYPES}
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@torch.no_grad()
def hidden(model: GlmForCausalLM, ids: Tensor, **options: Tensor) -> Tensor:
    return model(ids, **options).hidden


def changed_at(model: GlmForCausalLM, ids: Tensor, at: int, **options: Tensor) -> list[int]:
    """The tokens of row 0 whose hidden state moves when token `at` becomes another one."""
    other = ids.clone()
    other[0, at] = (other[0, at] + 1) % model.config.vocab_size
    moved = (hidden(model, ids, **options) - hidden(model, other, **options)).abs().amax(dim=-1)
    return (moved[0] > 1e-4).nonzero().flatten().tolist()


# --- who depends on whom ---------------------------------------------------------------------


@types
@quick
@given(seeds, st.integers(9, 16), st.data())
def test_a_causal_token_depends_on_no_later_one(
    model_type: str, seed: int, length: int, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, length - 1))
    moved = changed_at(MODELS[model_type], random_ids(1, length, seed=seed), at)
    assert moved[0] == at


@types
@quick
@given(seeds, st.integers(12, 18), st.data())
def test_a_prefix_token_depends_on_later_prefix_tokens_and_on_no_generated_one(
    model_type: str, seed: int, length: int, data: st.DataObject
) -> None:
    prefix = data.draw(st.integers(3, length - 1))
    options = {"prefix_lengths": torch.tensor([prefix])}
    ids = random_ids(1, length, seed=seed)
    generated = data.draw(st.integers(prefix, length - 1))
    assert changed_at(MODELS[model_type], ids, generated, **options)[0] == generated
    last = changed_at(MODELS[model_type], ids, prefix - 1, **options)
    if prefix <= 8:  # no more than index_topk: nothing of the prefix can be left out
        assert last[:prefix] == list(range(prefix))
    assert prefix - 1 in last


@quick
@given(seeds, st.integers(10, 16))
def test_a_prefix_of_one_token_or_none_is_causal(seed: int, length: int) -> None:
    model, ids = MODELS["glm_moe_dsa"], random_ids(2, length, seed=seed)
    out = hidden(model, ids, prefix_lengths=torch.tensor([0, 1]))
    torch.testing.assert_close(out, hidden(model, ids), **CLOSE)


def test_a_long_prefix_is_selected_from_both_directions() -> None:
    model, ids = MODELS["glm_moe_dsa"], random_ids(1, 20)
    early = {at: changed_at(model, ids, at, prefix_lengths=torch.tensor([16]))[0] for at in range(9, 16)}
    assert min(early.values()) < 8
    assert all(first <= at for at, first in early.items())


# --- rows ------------------------------------------------------------------------------------


@types
@quick
@given(seeds, st.lists(st.integers(1, 13), min_size=1, max_size=3), st.booleans())
def test_packed_documents_are_what_they_are_alone(
    model_type: str, seed: int, lengths: list[int], has_prefix: bool
) -> None:
    model, ids = MODELS[model_type], random_ids(1, sum(lengths), seed=seed)
    prefix = {"prefix_lengths": torch.tensor([3])} if has_prefix else {}
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).unsqueeze(0)
    packed = hidden(model, ids, document_ids=documents, **prefix)
    alone = [hidden(model, part, **prefix) for part in ids.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), **CLOSE)


@types
@quick
@given(seeds, st.lists(st.integers(1, 14), min_size=1, max_size=3), st.integers(0, 3), st.booleans())
def test_left_padding_changes_nothing(
    model_type: str, seed: int, lengths: list[int], more: int, has_prefix: bool
) -> None:
    model, longest = MODELS[model_type], max(lengths) + more
    rows = [random_ids(1, length, seed=seed + i) for i, length in enumerate(lengths)]
    ids = torch.cat([pad_last(row, (longest - row.shape[1], 0), value=7) for row in rows])
    mask = torch.cat([pad_last(torch.ones_like(row), (longest - row.shape[1], 0)) for row in rows])
    prefix = {"prefix_lengths": torch.tensor([4] * len(rows))} if has_prefix else {}
    out = hidden(model, ids, attention_mask=mask, **prefix)
    assert bool(out.isfinite().all())
    for row, states in zip(rows, out, strict=True):
        one = {name: lengths_[:1] for name, lengths_ in prefix.items()}
        torch.testing.assert_close(states[-row.shape[1] :], hidden(model, row, **one)[0], **CLOSE)


@types
def test_the_forms_of_attention_agree_in_the_whole_network(model_type: str) -> None:
    model, ids = tiny_model(tiny_config(model_type)), random_ids(2, 20)
    expected = hidden(model, ids)
    attentions = [m for m in model.modules() if isinstance(m, MultiHeadLatentAttention)]
    for form in ("expanded", "absorbed"):
        for attention in attentions:
            attention.form = form
        torch.testing.assert_close(hidden(model, ids), expected, **CLOSE)


@torch.no_grad()
def test_logits_to_keep_are_the_last_ones() -> None:
    model, ids = MODELS["glm_moe_dsa"], random_ids(2, 12)
    every = model(ids)
    kept = model(ids, logits_to_keep=3)
    assert every.logits.shape == (2, 12, 256)
    torch.testing.assert_close(kept.logits, every.logits[:, -3:], **CLOSE)
    assert torch.equal(kept.hidden, every.hidden)
    torch.testing.assert_close(every.logits, every.hidden @ model.lm_head.weight.T, **CLOSE)


# --- layers ----------------------------------------------------------------------------------


def test_shared_layers_own_no_indexer_and_use_the_selection_below() -> None:
    model = tiny_model(
        tiny_config(num_hidden_layers=5, indexer_types=["full", "shared", "full", "shared", "shared"])
    )
    names = {name.rsplit(".indexer.")[0] for name in dict(model.named_parameters()) if ".indexer." in name}
    assert names == {"model.layers.0.self_attn", "model.layers.2.self_attn", "mtp.0.layer.self_attn"}
    assert len(model.indexers()) == 3
    used: list[Selection | None] = []
    handles = [
        layer.register_forward_hook(lambda _module, _inputs, outputs: used.append(outputs[1]))
        for layer in model.model.layers
    ]
    hidden(model, random_ids(1, 16))
    for handle in handles:
        handle.remove()
    assert used[0] is used[1]
    assert used[2] is used[3] is used[4]
    assert used[0] is not None
    assert used[2] is not None
    assert not torch.equal(used[0].mask_BTS, used[2].mask_BTS)


@types
@torch.no_grad()
def test_the_mtp_layer_drafts_from_hidden_states_and_the_next_token(model_type: str) -> None:
    model, ids = MODELS[model_type], random_ids(2, 14)
    step = model.step(token_positions(ids[:, :-1]))

    def draft(tokens: Tensor) -> Tensor:
        embedding = model.model.embed_tokens(tokens[:, 1:])
        return model.mtp[0](hidden(model, tokens)[:, :-1], embedding, step)

    out = draft(ids)
    assert out.shape == (2, 13, 64)
    assert model.lm_head(out).shape == (2, 13, 256)
    other = ids.clone()
    other[:, 6] = (other[:, 6] + 1) % 256
    moved = (draft(other) - out).abs().amax(dim=-1) > 1e-4
    assert not moved[:, :5].any()
    assert moved[:, 5].all()  # its next token changed; state t with token t+1


@types
@torch.no_grad()
def test_the_mtp_layer_is_its_formula(model_type: str) -> None:
    model = tiny_model(tiny_config(model_type))
    mtp, generator = model.mtp[0], torch.Generator().manual_seed(0)
    norms = (mtp.enorm, mtp.hnorm, mtp.shared_head.norm)
    for norm in norms:
        norm.weight.normal_(1.0, 0.5, generator=generator)
    state, embedding = torch.randn(2, 1, 14, 64, generator=generator)
    step = model.step(token_positions(random_ids(1, 14)))

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.pow(2).mean(dim=-1, keepdim=True) + 1e-5).rsqrt() * weight

    # The embedding half comes first; the head's norm last.
    first, second = mtp.eh_proj.weight.split(64, dim=1)
    joined = rms(embedding, mtp.enorm.weight) @ first.T + rms(state, mtp.hnorm.weight) @ second.T
    out, _ = mtp.layer(joined, step, None)
    expected = rms(out, mtp.shared_head.norm.weight)
    torch.testing.assert_close(mtp(state, embedding, step), expected, **CLOSE)


@quick
@given(tiny_configs())
def test_every_config_gives_a_model_that_runs_and_learns(config: ModelConfig) -> None:
    model = tiny_model(config)
    model.train()
    model(random_ids(2, 10)).logits.logsumexp(dim=-1).mean().backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None and not name.startswith("mtp.") and ".indexer." not in name
    ]
    assert without == []
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_tied_embeddings_are_one_matrix() -> None:
    model = tiny_model(tiny_config(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_same_generator_seed_gives_the_same_weights() -> None:
    one, same, other = tiny_model(seed=1).state_dict(), tiny_model(seed=1).state_dict(), tiny_model(seed=2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other.lm_head.weight)
    std = one["model.layers.1.mlp.experts.gate_up_proj"].std()
    assert float(std) == pytest.approx(0.1, rel=0.05)
