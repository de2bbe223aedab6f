"""A whole feed-forward layer in one call: the right experts, summed right, whatever runs beside.

Exactly (`exact=True`) it is the reference; with activations rounded to int8 it lies within 4 percent
(root mean square): 1.2 as a rule, for a single token of a narrow layer up to 4.6 (measured).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm5.formats.packed import PROJECTIONS, Packed, Scheme
from glm5.formats.packing import words_per_row
from glm5.kernels import cpu, reference
from glm5.layers.fused_layer import feed_handle
from glm5.layers.loading import round_packed
from glm5.layers.packed import PackedExperts, PackedLinear
from glm5.model.moe import MixtureOfExperts, Router
from tests.kernels.kernel_fixture import (
    FUSED,
    INSTRUCTION_SETS,
    assert_same_bits,
    generator,
    on_each,
    on_threads,
    random_integers,
    relative,
)
from tests.kernels.kernel_fixture import instruction_set as instruction_set
from tests.model_fixture import tiny_config

CLOSE = 0.04  # int8 activations
CLOSE_ALONE = 0.06
SAME = 1e-5  # other orders of summation
Group = tuple[int, int, int]
few = settings(max_examples=min(50, settings.default.max_examples), deadline=None)
seeds = st.integers(0, 2**31)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Feed(NamedTuple):
    """gate, up, down as packed matrices and as the floats they stand for."""

    matrices: tuple[cpu.Matrix, cpu.Matrix, cpu.Matrix]
    weights: tuple[Tensor, Tensor, Tensor]


def feed(hidden: int, width: int, seed: int, bits: int = 4, groups: Group = (32, 32, 32)) -> Feed:
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    made = [
        random_integers(*s, bits, g, seed + i) for i, (s, g) in enumerate(zip(shapes, groups, strict=True))
    ]
    gate, up, down = made
    return Feed((gate.matrix, up.matrix, down.matrix), (gate.weight, up.weight, down.weight))


class Layer(NamedTuple):
    native: cpu.MoeLayer
    experts: list[Feed]
    shared: Feed | None
    topk: int

    def reference(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = reference.mixture(x, ids, weights, [expert.weights for expert in self.experts])
        return out if self.shared is None else out + reference.feed_forward(x, *self.shared.weights)

    def routing(self, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
        random = generator(seed)
        shares = torch.rand(tokens, len(self.experts), generator=random)
        return shares.topk(self.topk, dim=1).indices, torch.rand(tokens, self.topk, generator=random)


def layer(
    hidden: int = 96, width: int = 64, shared_width: int = 128, experts: int = 8, topk: int = 3,
    bits: int = 4, seed: int = 0, groups: Group = (32, 32, 32), shared_groups: Group = (32, 32, 32),
    **router: Any,
) -> Layer:  # fmt: skip
    bank = [feed(hidden, width, seed + 10 * e, bits, groups) for e in range(experts)]
    shared = feed(hidden, shared_width, seed + 7, bits, shared_groups) if shared_width else None
    native = of(hidden, [expert.matrices for expert in bank], shared and shared.matrices)
    weight = torch.randn(experts, hidden, generator=generator(seed)) / hidden**0.5
    native.set_router(cpu.Matrix(weight), torch.zeros(experts), topk=topk, **router)
    return Layer(native, bank, shared, topk)


def of(hidden: int, experts: list[Any], shared: Any = None) -> cpu.MoeLayer:
    return cpu.MoeLayer(hidden, cpu.ExpertBank.of(hidden, experts) if experts else None, shared)


def tokens_of(count: int, hidden: int, seed: int = 0) -> Tensor:
    return torch.randn(count, hidden, generator=generator(seed))


# --- the network of experts -------------------------------------------------------------------------


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    hidden, width = 32 * draw(st.integers(1, 6)), 32 * draw(st.integers(1, 5))
    shared, experts = 32 * draw(st.integers(0, 4)), draw(st.integers(1, 12))
    bits, topk = draw(st.sampled_from([4, 8])), draw(st.integers(1, min(experts, 4)))
    return layer(hidden, width, shared, experts, topk, bits, draw(seeds))


@few
@given(layers(), st.integers(1, 70), seeds)
def test_experts_are_the_reference(made: Layer, count: int, seed: int) -> None:
    x, routing = tokens_of(count, made.native.hidden, seed), made.routing(count, seed)
    wanted = made.reference(x, *routing)

    def both() -> tuple[Tensor, Tensor]:
        return made.native(x, routing=routing, exact=True), made.native(x, routing=routing)

    found = on_each(INSTRUCTION_SETS, both)
    for name, (exact, rounded) in found.items():
        assert relative(exact, wanted) < SAME, name
        assert relative(rounded, wanted) < (CLOSE if count > 1 else CLOSE_ALONE), name
        if name in FUSED:
            assert_same_bits(exact, found[FUSED[0]][0], name)
            assert_same_bits(rounded, found[FUSED[0]][1], name)


def test_norm_and_sum_surround_the_layer(instruction_set: str) -> None:
    made, x = layer(), tokens_of(9, 96)
    norm, add = torch.rand(96, generator=generator(1)) + 0.5, tokens_of(9, 96, seed=2)
    normed = cpu.linear(x, cpu.Matrix(torch.eye(96)), norm=norm, eps=1e-5)
    for exact in (False, True):
        plain = made.native(normed, exact=exact)
        assert_same_bits(made.native(x, norm=norm, eps=1e-5, add=add, exact=exact), plain + add)


def test_sixteen_bits_are_rounded_once_at_the_end(instruction_set: str) -> None:
    made, x, add = layer(), tokens_of(9, 96).bfloat16(), tokens_of(9, 96, seed=2).bfloat16()
    routing = made.routing(9, seed=3)
    wide = made.native(x.float(), routing=routing, add=add.float())
    assert_same_bits(made.native(x, routing=routing, add=add), wide.bfloat16())


def test_a_shared_expert_alone_is_a_dense_network(instruction_set: str) -> None:
    made = feed(96, 160, seed=1)
    native = cpu.MoeLayer(96, shared=made.matrices)
    for count in (0, 1, 3, 70):
        x = tokens_of(count, 96)
        if count:
            assert relative(native(x, exact=True), reference.feed_forward(x, *made.weights)) < SAME
            assert relative(native(x), reference.feed_forward(x, *made.weights)) < CLOSE
        assert native(x).shape == (count, 96)


def test_experts_alone_need_no_shared_one(instruction_set: str) -> None:
    made, x = layer(shared_width=0), tokens_of(20, 96)
    routing = made.routing(20, seed=4)
    assert relative(made.native(x, routing=routing, exact=True), made.reference(x, *routing)) < SAME


def test_an_expert_chosen_twice_counts_twice(instruction_set: str) -> None:
    made, x = layer(), tokens_of(3, 96)
    ids, weights = torch.tensor([[5, 5, 1], [2, 2, 2], [0, 1, 0]]), torch.rand(3, 3, generator=generator(0))
    wanted = reference.feed_forward(x, *made.shared.weights)
    for k in range(3):  # the reference takes an expert once for a token
        one, bank = slice(k, k + 1), [expert.weights for expert in made.experts]
        wanted += reference.mixture(x, ids[:, one], weights[:, one], bank)
    assert relative(made.native(x, routing=(ids, weights), exact=True), wanted) < SAME


def test_float_experts_beside_a_packed_shared_one(instruction_set: str) -> None:
    """A layer may be of several kinds: bf16 routed experts, int4 or int8 shared ones."""
    bank = [tuple(w.bfloat16() for w in feed(96, 64, 10 * e).weights) for e in range(4)]
    for bits in (4, 8):
        shared = feed(96, 128, seed=9, bits=bits)
        native = of(96, [tuple(cpu.Matrix(w) for w in expert) for expert in bank], shared.matrices)
        native.set_router(cpu.Matrix(torch.zeros(4, 96)), torch.zeros(4), topk=2)
        x, (ids, weights) = tokens_of(11, 96), Layer(native, [shared] * 4, shared, 2).routing(11, seed=5)
        wanted = reference.mixture(x, ids, weights, [tuple(w.float() for w in expert) for expert in bank])
        wanted += reference.feed_forward(x, *shared.weights)
        assert relative(native(x, routing=(ids, weights), exact=True), wanted) < SAME
        assert relative(native(x, routing=(ids, weights)), wanted) < CLOSE


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [40, 72])
def test_widths_without_blocks_go_the_exact_way(instruction_set: str, bits: int, width: int) -> None:
    made = layer(96, width, width, bits=bits, groups=(32, 32, width), shared_groups=(32, 32, 8))
    x = tokens_of(7, 96)
    routing = made.routing(7, seed=6)
    assert relative(made.native(x, routing=routing), made.reference(x, *routing)) < CLOSE
    assert relative(made.native(x, routing=routing, exact=True), made.reference(x, *routing)) < SAME


GROUPS = [
    ((64, 64, 64), (32, 32, 32)),
    ((32, 32, 64), (32, 32, 128)),
    ((128, 128, 64), (64, 64, 32)),
    ((64, 32, 32), (32, 32, 32)),
    ((32, 32, 32), (64, 64, 64)),
    ((32, 32, 32), (128, 128, 32)),
    ((32, 64, 32), (128, 64, 32)),
]


@pytest.mark.parametrize(("routed", "shared"), GROUPS)
def test_routed_and_shared_experts_may_differ_in_groups(routed: Group, shared: Group) -> None:
    made = layer(128, 128, 128, groups=routed, shared_groups=shared)
    x, routing = tokens_of(5, 128), made.routing(5, seed=7)
    wanted = made.reference(x, *routing)
    for name, out in on_each(INSTRUCTION_SETS, lambda: made.native(x, routing=routing)).items():
        assert relative(out, wanted) < CLOSE, name


@pytest.mark.parametrize("groups", [(64, 32, 32), (32, 64, 32)])
def test_gate_and_up_may_differ_in_groups(groups: Group) -> None:
    made, x = feed(128, 64, seed=1, groups=groups), tokens_of(5, 128)
    assert (
        relative(cpu.MoeLayer(128, shared=made.matrices)(x), reference.feed_forward(x, *made.weights)) < CLOSE
    )


# --- beside others, on threads ----------------------------------------------------------------------


@few
@given(layers(), st.integers(2, 70), seeds)
def test_a_token_does_not_depend_on_its_batch(made: Layer, count: int, seed: int) -> None:
    x = tokens_of(count, made.native.hidden, seed)

    def differing() -> list[tuple[int, bool]]:
        together = {exact: made.native(x, exact=exact) for exact in (False, True)}
        return [
            (t, exact) for t in {0, count // 2, count - 1} for exact in (False, True)
            if not torch.equal(together[exact][t], made.native(x[t], exact=exact))
        ]  # fmt: skip

    assert on_each(INSTRUCTION_SETS, differing) == {name: [] for name in INSTRUCTION_SETS}


@pytest.mark.parametrize("bits", [4, 8])
def test_threads_change_nothing(instruction_set: str, bits: int) -> None:
    made = layer(192, 160, 224, bits=bits, factor=2.5)
    for count in (1, 2, 33, 250):  # the last is parted over tokens too
        x, found = tokens_of(count, 192, seed=count), []
        for threads in (1, 2, 3):
            with on_threads(threads):
                found.append(made.native(x))
        assert_same_bits(found[1], found[0])
        assert_same_bits(found[2], found[0])
        assert_same_bits(found[0][-1], made.native(x[-1]))


def test_a_call_leaves_nothing_for_the_next(instruction_set: str) -> None:
    """Buffers are kept between calls: a larger or other layer before it changes no bit."""
    small, large = layer(32, 32, 32), layer(160, 192, 96, bits=8, seed=3)
    x = tokens_of(3, 32)
    wanted = small.native(x)
    large.native(tokens_of(70, 160))
    assert_same_bits(small.native(x), wanted)
    for empty in (small.native(x[:0]), large.native(torch.empty(2, 0, 160))):
        assert empty.numel() == 0
    assert_same_bits(small.native(x), wanted)


# --- routing ----------------------------------------------------------------------------------------

ROUTERS = [(1, 1, 2), (4, 2, 3), (4, 3, 6), (2, 1, 1), (8, 4, 4), (1, 1, 16)]  # groups, kept, topk


def router(groups: int, kept: int, topk: int, normalize: bool, seed: int, experts: int = 16) -> Router:
    made = Router(tiny_config(
        n_routed_experts=experts, hidden_size=96, n_group=groups, topk_group=kept, num_experts_per_tok=topk,
        norm_topk_prob=normalize, routed_scaling_factor=2.5,
    ))  # fmt: skip
    made.weight.data.normal_(0.0, 0.2, generator=generator(seed))
    made.e_score_correction_bias.normal_(0.0, 0.3, generator=generator(seed + 1))
    return made.eval()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("groups", "kept", "topk"), ROUTERS)
def test_the_router_chooses_and_weighs_as_the_model_does(
    instruction_set: str, groups: int, kept: int, topk: int, normalize: bool
) -> None:
    gate = router(groups, kept, topk, normalize, seed=groups)
    made = layer(96, 64, 0, experts=16, topk=topk)
    made.native.set_router(
        cpu.Matrix(gate.weight.detach()), gate.e_score_correction_bias, topk=topk, groups=groups,
        topk_groups=kept, normalize=normalize, factor=2.5,
    )  # fmt: skip
    for count in (1, 5, 70):  # 70: more than one band of tokens
        x, told = tokens_of(count, 96, seed=count), cpu.Told(count, topk, 16)
        out = made.native(x, exact=True, told=told)
        routing = gate(x)
        alone = made.native.route(x)
        for found in (told, alone):
            assert torch.equal(found.ids.long(), routing.topk_ids_TK)
            torch.testing.assert_close(found.weights, routing.topk_weights_TK)
            torch.testing.assert_close(found.scores, routing.scores_TE)
        assert_same_bits(alone.weights, told.weights)
        wanted = made.reference(x, routing.topk_ids_TK, routing.topk_weights_TK)
        assert relative(out, wanted) < SAME


def test_of_equal_scores_the_lower_expert_comes_first(instruction_set: str) -> None:
    made = layer(96, 32, 0, experts=8, topk=3)
    for bias, wanted in ((torch.zeros(8), [0, 1, 2]), (torch.tensor([0.0, 0, 0, 1, 0, 0, 1, 0]), [3, 6, 0])):
        made.native.set_router(cpu.Matrix(torch.zeros(8, 96)), bias, topk=3)
        assert made.native.route(tokens_of(4, 96)).ids.tolist() == [wanted] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_router_of_any_float_kind_is_read_as_it_is(instruction_set: str, dtype: torch.dtype) -> None:
    made, weight = layer(96, 32, 0), torch.randn(8, 96, generator=generator(1)).to(dtype)
    found = []
    for matrix in (cpu.Matrix(weight), cpu.Matrix(weight.float())):
        made.native.set_router(matrix, torch.zeros(8), topk=3)
        found.append(made.native(tokens_of(9, 96)))
    assert_same_bits(*found)


def test_given_routing_is_used(instruction_set: str) -> None:
    made, x = layer(), tokens_of(70, 96)
    by_router = made.native(x)
    ids, weights = made.routing(70, seed=8)
    assert not torch.equal(made.native(x, routing=(ids, weights)), by_router)
    for kind in (torch.int64, torch.int32, torch.int16):
        again = made.native(x, routing=(ids.to(kind), weights.double()))
        assert_same_bits(again, made.native(x, routing=(ids, weights)))
    told = made.native.route(x)
    assert_same_bits(made.native(x, routing=(told.ids, told.weights)), by_router)


def test_a_changed_router_is_seen(instruction_set: str) -> None:
    """Weights and bias are read where they lie."""
    made, x = layer(topk=2), tokens_of(7, 96)
    weight, bias = torch.randn(8, 96, generator=generator(3)), torch.zeros(8)
    made.native.set_router(cpu.Matrix(weight), bias, topk=2)
    first = made.native.route(x).ids
    bias[5] = 10
    assert made.native.route(x).ids[:, 0].eq(5).all()
    bias[5] = 0
    assert torch.equal(made.native.route(x).ids, first)
    weight.neg_()
    assert not torch.equal(made.native.route(x).ids, first)


# --- slots ------------------------------------------------------------------------------------------


def test_experts_are_put_and_dropped_between_calls(instruction_set: str) -> None:
    feeds = [feed(96, 64, seed=10 * e) for e in range(4)]
    whole = cpu.MoeLayer(96, cpu.ExpertBank.of(96, [f.matrices for f in feeds]))
    x, ids = tokens_of(5, 96), torch.tensor([[0, 2]] * 5)
    routing = (ids, torch.rand(5, 2, generator=generator(1)))
    wanted = whole(x, routing=routing)
    bank = cpu.ExpertBank(96, 4)
    part = cpu.MoeLayer(96, bank)
    for expert in (0, 2):
        bank.put(expert, feeds[expert].matrices)
    assert_same_bits(part(x, routing=routing), wanted)
    bank.put(2, feeds[3].matrices)
    assert not torch.equal(part(x, routing=routing), wanted)
    bank.drop(2)
    with pytest.raises(RuntimeError, match="expert 2 is not in memory"):
        part(x, routing=routing)
    bank.put(2, feeds[2].matrices)
    assert_same_bits(part(x, routing=routing), wanted)
    with pytest.raises(ValueError, match="no place 4"):
        bank.put(4, feeds[0].matrices)


# --- in the model -----------------------------------------------------------------------------------


def mixtures(seed: int, scheme: Scheme, **changes: Any) -> tuple[MixtureOfExperts, MixtureOfExperts]:
    """A layer of packed parts, and the same in the floats that its codes stand for."""
    sizes = {"hidden_size": 96, "moe_intermediate_size": 64, "n_shared_experts": 2, "num_experts_per_tok": 3}
    config = tiny_config("glm4_moe", **{**sizes, **changes})
    plain, packed = MixtureOfExperts(config, 0).eval(), MixtureOfExperts(config, 0).eval()
    for parameter in plain.parameters():
        parameter.data.normal_(0.0, 0.1, generator=generator(seed))
    plain.gate.e_score_correction_bias.normal_(0.0, 0.2, generator=generator(seed + 1))
    count, hidden, width = plain.experts.down_proj.shape
    experts = PackedExperts(count, hidden, width, scheme)
    experts.reserve(torch.device("cpu"))
    for expert in range(count):
        gate, up = plain.experts.gate_up_proj.data[expert].split(width)
        for name, values in zip(PROJECTIONS, (gate, up, plain.experts.down_proj.data[expert]), strict=True):
            round_in(values, scheme, experts.packed(expert, name))
            values.copy_(experts.weight(expert, name))
    packed.gate, packed.experts = plain.gate, experts  # type: ignore[assignment]
    if plain.shared_experts is not None:
        pack_mlp(packed.shared_experts, plain.shared_experts, scheme)
    return packed, plain


def round_in(values: Tensor, scheme: Scheme, memory: Packed) -> None:
    rounded = round_packed(values.contiguous(), scheme, "w", Path("here"))
    memory.words.copy_(rounded.words)
    memory.scales.copy_(rounded.scales)


def pack_mlp(packed: Any, plain: Any, scheme: Scheme) -> None:
    for name in PROJECTIONS:
        linear = getattr(plain, name)
        made = PackedLinear(linear.in_features, linear.out_features, scheme)
        round_in(linear.weight.data, scheme, made.reserve(torch.device("cpu")))
        linear.weight.data.copy_(made.weight)
        setattr(packed, name, made)


SCHEMES = [Scheme(4, 32), Scheme(8, 64, torch.float32), Scheme(4, 32, torch.float16)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("changes", [{}, {"n_group": 4, "topk_group": 2}, {"n_shared_experts": 0}], ids=str)
def test_a_packed_mixture_is_the_mixture_of_its_weights(
    instruction_set: str, scheme: Scheme, changes: dict[str, Any]
) -> None:
    sizes = {} if scheme.group == 32 else {"hidden_size": 128}
    packed, plain = mixtures(3, scheme, **sizes, **changes)
    hidden = plain.gate.weight.shape[1]
    whole = feed_handle(packed)
    assert whole is not None
    for shape in ((1, 1, hidden), (2, 35, hidden)):
        x = torch.randn(shape, generator=generator(9))
        wanted = plain(x)
        assert relative(packed(x), wanted) < CLOSE  # its parts one after the other
        assert relative(whole(x), wanted) < CLOSE  # all in one call
        with torch.enable_grad():  # unpacked, expert by expert
            torch.testing.assert_close(packed(x), wanted, atol=1e-5, rtol=1e-5)


def test_a_float_shared_expert_stays_beside_packed_ones() -> None:
    packed, plain = mixtures(4, Scheme(4, 32))
    packed.shared_experts = plain.shared_experts
    assert feed_handle(packed) is None
    x = torch.randn(2, 5, 96, generator=generator(9))
    assert relative(packed(x), plain(x)) < CLOSE


def test_an_expert_is_one_run_of_bytes_as_in_the_file() -> None:
    packed, _ = mixtures(5, Scheme(4, 32))
    experts: Any = packed.experts
    rows = ((64, 96), (64, 96), (96, 64))
    assert experts.bytes_per_expert == sum(r * (words_per_row(c, 4) * 4 + c // 32 * 2) for r, c in rows)
    parts = [part for name in PROJECTIONS for part in experts.packed(2, name)]
    run = torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])
    assert torch.equal(experts.bytes[2, : experts.bytes_per_expert], run)


# --- bad arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"x": torch.ones(2, 64)},
        {"x": torch.ones(2, 96).half()},
        {"norm": torch.ones(64)},
        {"add": torch.ones(3, 96)},
        {"add": torch.ones(2, 96).bfloat16()},
        {"add": torch.ones(96, 2).T},
        {"routing": (torch.zeros(3, 3), torch.ones(3, 3))},
        {"routing": (torch.zeros(2, 3), torch.ones(2, 2))},
        {"routing": (torch.full((2, 3), 8), torch.ones(2, 3))},
        {"routing": (torch.full((2, 3), -1), torch.ones(2, 3))},
        {"told": cpu.Told(3, 3, 8)},
        {"told": cpu.Told(2, 2, 8)},
        {"told": cpu.Told(2, 3, 7)},
    ],
)
def test_arguments_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    made = layer()
    with pytest.raises(ValueError, match=r"\w"):
        made.native(**{"x": torch.ones(2, 96), **options})


@pytest.mark.parametrize(
    "options",
    [
        {"weight": torch.ones(7, 96)},
        {"weight": torch.ones(8, 64)},
        {"bias": torch.zeros(7)},
        {"topk": 0},
        {"topk": 9},
        {"groups": 3},
        {"groups": 4, "topk_groups": 0},
        {"groups": 4, "topk_groups": 5},
        {"groups": 4, "topk_groups": 1, "topk": 3},
    ],
)
def test_routers_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    made = layer()
    wanted: dict[str, Any] = {"weight": torch.ones(8, 96), "bias": torch.zeros(8), "topk": 2, **options}
    with pytest.raises(ValueError, match=r"\w"):
        made.native.set_router(cpu.Matrix(wanted.pop("weight")), **wanted)


def test_layers_that_do_not_fit_are_refused() -> None:
    good, wide = feed(96, 64, seed=0).matrices, feed(96, 32, seed=1).matrices
    eight = feed(96, 64, seed=2, bits=8).matrices
    for hidden, experts, shared in (
        (64, [good], None),
        (96, [good, wide], None),
        (96, [good, eight], None),
        (96, [(good[0], good[2], good[1])], None),
        (96, [], (good[0], wide[1], good[2])),
    ):
        with pytest.raises(ValueError, match=r"\w"):
            of(hidden, experts, shared)
    with pytest.raises(ValueError, match="no router"):
        of(96, [good])(torch.ones(1, 96))
