"""Products with weights as they are stored: the reference's bits, whatever runs them and beside what.

Integer weights round their activations to int8 by the block; everything after that is exact or has
one order, so that instruction sets, threads and neighbours in the batch must agree to the last bit.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm5.formats.packing import pack
from glm5.kernels import cpu, reference
from glm5.model.norms import RMSNorm
from tests.kernels.kernel_fixture import (
    FUSED,
    INSTRUCTION_SETS,
    SCALE_DTYPES,
    Integers,
    assert_same_bits,
    generator,
    on_each,
    on_threads,
    random_integers,
)
from tests.kernels.kernel_fixture import instruction_set as instruction_set

quick = settings(deadline=None)
few = settings(max_examples=min(15, settings.default.max_examples), deadline=None)
seeds = st.integers(0, 2**31)
activation_dtypes = st.sampled_from([torch.float32, torch.bfloat16])
WIDEST = 1300  # past the 1024 columns that an int4 row reads in one go


@st.composite
def integer_matrices(draw: st.DrawFn) -> Integers:
    """Widths in multiples of 32 with every kind of tail; groups that divide them, or a row in one."""
    group = draw(st.sampled_from([32, 64, 96, 128, 0]))
    if group:
        columns = group * draw(st.integers(1, WIDEST // group))
    else:
        columns = group = 32 * draw(st.integers(1, WIDEST // 32))
    rows, bits = draw(st.integers(1, 80)), draw(st.sampled_from([4, 8]))
    dtype = draw(st.sampled_from(SCALE_DTYPES))
    return random_integers(rows, columns, bits, group, draw(seeds), dtype)


def activations(tokens: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different size, one of them all zero, with an outlier in every row."""
    random = generator(seed)
    x = torch.randn(tokens, columns, generator=random)
    x[:, seed % columns] *= 50
    x *= 10.0 ** torch.randint(-6, 7, (tokens, 1), generator=random)
    x[seed % tokens] *= seed % 3 > 0
    return x.to(dtype)


def random_floats(kind: str, rows: int, columns: int, seed: int) -> tuple[cpu.Matrix, Tensor]:
    """(matrix, its exact values in fp64) of a float kind, or of `int4` or `int8`."""
    if kind.startswith("int"):
        made = random_integers(rows, columns, int(kind[3:]), columns, seed)
        return made.matrix, made.weight.double()
    values = torch.randn(rows, columns, generator=generator(seed))
    if kind != "e4m3":
        stored = values.to({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[kind])
        return cpu.Matrix(stored), stored.double()
    stored, block = values.mul(50).to(torch.float8_e4m3fn), (16, 48, 128)[seed % 3]
    shape = (-(-rows // block), -(-columns // block))
    scales = 0.02 * (0.5 + torch.rand(shape, generator=generator(seed)))
    whole = torch.kron(scales.double(), torch.ones(block, block, dtype=torch.float64))
    matrix = cpu.Matrix(stored, scales, group=block)
    return matrix, stored.double() * whole[:rows, :columns]


KINDS = ("bf16", "fp16", "fp32", "e4m3")
kinds = pytest.mark.parametrize("kind", KINDS)


def assert_exact(found: Tensor, x: Tensor, weight: Tensor) -> None:
    """Within 1e-5 of the spread that a sum of so many products has."""
    wanted = x.double() @ weight.T
    spread = (x.double().pow(2) @ weight.pow(2).T).sqrt()
    assert bool(((found.double() - wanted).abs() <= 1e-5 * spread).all())


# --- integers ---------------------------------------------------------------------------------------


@quick
@given(integer_matrices(), st.integers(1, 40), activation_dtypes, seeds)
def test_integer_products_are_the_reference_on_every_instruction_set(
    made: Integers, tokens: int, dtype: torch.dtype, seed: int
) -> None:
    x, block = activations(tokens, made.codes.shape[1], seed, dtype), made.matrix.block
    wanted = reference.integer_linear(x, made.codes, made.block_scales(block), block, made.matrix.bits)
    found = on_each(INSTRUCTION_SETS, lambda: cpu.linear(x, made.matrix, dtype=torch.float32))
    for name, out in found.items():
        assert_same_bits(out, wanted, name)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 5), st.sampled_from([32, 64, 128, 256, 512]), st.integers(0, 4),
    st.sampled_from([4, 8]), st.sampled_from(SCALE_DTYPES), activation_dtypes, seeds,
)  # fmt: skip
def test_several_narrow_rows_at_a_time_are_the_reference(
    rows: int, tokens: int, columns: int, halvings: int, bits: int, scales: torch.dtype, dtype: torch.dtype,
    seed: int,
) -> None:  # fmt: skip
    made = random_integers(rows, columns, bits, max(32, columns >> halvings), seed, scales)
    x, block = activations(tokens, columns, seed, dtype), made.matrix.block
    wanted = reference.integer_linear(x, made.codes, made.block_scales(block), block, bits)
    for name, out in on_each(
        INSTRUCTION_SETS, lambda: cpu.linear(x, made.matrix, dtype=torch.float32)
    ).items():
        assert_same_bits(out, wanted, name)


@quick
@given(integer_matrices(), st.integers(1, 9), activation_dtypes, seeds, st.sets(st.sampled_from("ban")))
def test_norm_bias_and_sum_are_one_rounding_each(
    made: Integers, tokens: int, dtype: torch.dtype, seed: int, wanted: set[str]
) -> None:
    rows, columns = made.codes.shape
    x, random, block = activations(tokens, columns, seed, dtype), generator(seed), made.matrix.block
    bias = torch.randn(rows, generator=random) if "b" in wanted else None
    add = torch.randn(tokens, rows, generator=random).to(dtype) if "a" in wanted else None
    norm = torch.rand(columns, generator=random) + 0.5 if "n" in wanted else None
    identity = cpu.Matrix(torch.eye(columns))

    def both() -> tuple[Tensor, Tensor]:
        """The product, and the same one step at a time."""
        normed = x if norm is None else cpu.linear(x, identity, norm=norm, eps=1e-5, dtype=torch.float32)
        slow = reference.integer_linear(normed, made.codes, made.block_scales(block), block, made.matrix.bits)
        slow = slow if bias is None else slow + bias
        slow = slow if add is None else slow + add.float()
        return cpu.linear(x, made.matrix, bias=bias, add=add, norm=norm, eps=1e-5), slow.to(dtype)

    for name, (out, slow) in on_each(INSTRUCTION_SETS, both).items():
        assert_same_bits(out, slow, name)


@quick
@given(st.integers(1, 200), st.integers(1, 5), activation_dtypes, seeds)
def test_the_norm_is_rms_norm(columns: int, tokens: int, dtype: torch.dtype, seed: int) -> None:
    x, weight = activations(tokens, columns, seed, dtype), torch.rand(columns, generator=generator(seed))
    wanted = x.double() / (x.double().pow(2).mean(dim=1, keepdim=True) + 1e-5).sqrt() * weight
    identity = cpu.Matrix(torch.eye(columns))
    found = on_each(
        INSTRUCTION_SETS, lambda: cpu.linear(x, identity, norm=weight, eps=1e-5, dtype=torch.float32)
    )
    for name, out in found.items():
        torch.testing.assert_close(out.double(), wanted, rtol=2e-6, atol=1e-30)
        if name in FUSED:
            assert_same_bits(out, found[FUSED[0]], name)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("columns", "group"), [(96, 64), (160, 128), (64, 1000), (1056, 96), (224, 192)])
def test_a_last_group_may_be_short(columns: int, group: int, bits: int) -> None:
    made = random_integers(37, columns, bits, group, seed=columns)
    for tokens in (1, 2, 3, 9):
        x, block = activations(tokens, columns, seed=tokens), made.matrix.block
        wanted = reference.integer_linear(x, made.codes, made.block_scales(block), block, made.matrix.bits)
        for name, out in on_each(INSTRUCTION_SETS, lambda x=x: cpu.linear(x, made.matrix)).items():
            assert_same_bits(out, wanted, name)
        assert_exact(cpu.linear(x, made.matrix, exact=True), x, made.weight.double())


@quick
@given(st.sampled_from([4, 8]), st.integers(1, 90), st.integers(0, 90), seeds)
def test_widths_without_blocks_go_the_exact_way(bits: int, columns: int, group: int, seed: int) -> None:
    group = group or columns
    made = random_integers(19, columns, bits, group, seed)
    x = activations(5, columns, seed)
    exact = on_each(FUSED, lambda: cpu.linear(x, made.matrix, exact=True))
    for name, out in exact.items():
        assert_same_bits(out, exact[FUSED[0]], name)
        assert_exact(out, x, made.weight.double())
    if columns % 32 or (group < columns and group % 32):
        assert made.matrix.block == 0
        assert_same_bits(cpu.linear(x, made.matrix), cpu.linear(x, made.matrix, exact=True))


@quick
@given(integer_matrices(), st.integers(1, 12), seeds)
def test_the_exact_way_does_not_round_activations(made: Integers, tokens: int, seed: int) -> None:
    x = activations(tokens, made.codes.shape[1], seed)
    for out in on_each(INSTRUCTION_SETS, lambda: cpu.linear(x, made.matrix, exact=True)).values():
        assert_exact(out, x, made.weight.double())


@pytest.mark.parametrize("size", [0.0, 2.0**-100, 2.0**-50, 2.0**50, 2.0**110])
def test_activations_of_any_size_are_rounded_alike(instruction_set: str, size: float) -> None:
    made = random_integers(16, 128, 4, 32, seed=0)
    x = torch.randn(6, 128, generator=generator(1))
    wanted = cpu.linear(x, made.matrix)
    assert torch.equal(cpu.linear(x * size, made.matrix), wanted * size)


def test_subnormal_activations_count_as_zero(instruction_set: str) -> None:
    made = random_integers(16, 128, 4, 32, seed=0)
    found = cpu.linear(torch.full((3, 128), 1e-39), made.matrix)
    assert found.abs().max() <= 1e-36


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf")],
)  # fmt: skip
def test_what_is_not_finite_stays_visible(instruction_set: str, value: float) -> None:
    made = random_integers(16, 128, 4, 32, seed=0)
    x = torch.randn(5, 128, generator=generator(1))
    x[2, 17] = value
    finite = torch.isfinite(cpu.linear(x, made.matrix))
    assert not finite[2].any()
    assert finite[[0, 1, 3, 4]].all()


# --- float weights ----------------------------------------------------------------------------------


@kinds
@quick
@given(st.integers(1, 80), st.integers(1, 150), st.integers(1, 40), activation_dtypes, seeds)
def test_float_products_are_exact_at_any_width(
    kind: str, rows: int, columns: int, tokens: int, dtype: torch.dtype, seed: int
) -> None:
    matrix, weight = random_floats(kind, rows, columns, seed)
    x = activations(tokens, columns, seed, dtype)
    found = on_each(INSTRUCTION_SETS, lambda: cpu.linear(x, matrix, dtype=torch.float32))
    for name, out in found.items():
        assert_exact(out, x, weight)
        if name in FUSED:
            assert_same_bits(out, found[FUSED[0]], name)


def test_every_fp8_code_has_its_value(instruction_set: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127].view(torch.float8_e4m3fn)  # without the two NaNs
    matrix = cpu.Matrix(codes[:, None].contiguous(), torch.ones(16, 1), group=16)
    assert torch.equal(cpu.linear(torch.ones(1, 1), matrix)[0], codes.float())


def test_every_finite_fp16_weight_has_its_value(instruction_set: str) -> None:
    weight = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    weight = weight[weight.isfinite()]
    wide = cpu.linear(torch.eye(16), cpu.Matrix(weight.reshape(-1, 16).contiguous()))
    assert torch.equal(wide.T.reshape(-1), weight.float())
    assert torch.equal(cpu.linear(torch.ones(1, 1), cpu.Matrix(weight[:, None]))[0], weight.float())


# --- one row is what it is alone, and on one thread -------------------------------------------------

ALL_KINDS = ("int4", "int8", *KINDS)


@pytest.mark.parametrize("kind", ALL_KINDS)
@few
@given(st.integers(1, 80), st.integers(1, 20), st.integers(2, 40), seeds)
def test_a_row_does_not_depend_on_its_batch(kind: str, rows: int, width: int, tokens: int, seed: int) -> None:
    matrix, _ = random_floats(kind, rows, 32 * width if kind.startswith("int") else 15 * width, seed)
    x = activations(tokens, matrix.columns, seed)

    def rows_differ() -> list[int]:
        together = cpu.linear(x, matrix)
        return [t for t in range(tokens) if not torch.equal(together[t], cpu.linear(x[t], matrix))]

    assert on_each(INSTRUCTION_SETS, rows_differ) == {name: [] for name in INSTRUCTION_SETS}


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("exact", [False, True])
def test_threads_change_nothing(instruction_set: str, kind: str, exact: bool) -> None:
    matrix, _ = random_floats(kind, 300, 224, seed=5)
    norm = torch.rand(224, generator=generator(0)) + 0.5
    for tokens in (1, 3, 33, 250):  # the last is parted over tokens too
        x = activations(tokens, 224, seed=tokens)
        found = []
        for count in (1, 2, 3):
            with on_threads(count):
                found.append(cpu.linear(x, matrix, norm=norm, eps=1e-6, exact=exact))
        assert_same_bits(found[1], found[0])
        assert_same_bits(found[2], found[0])
        assert_same_bits(found[0][-1], cpu.linear(x[-1], matrix, norm=norm, eps=1e-6, exact=exact))


# --- shapes and arguments ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_leading_dimensions_are_kept_and_may_be_empty(instruction_set: str, kind: str) -> None:
    matrix, _ = random_floats(kind, 17, 64, seed=1)
    x = torch.randn(2, 3, 64, generator=generator(1))
    flat = cpu.linear(x.flatten(0, 1), matrix)
    assert torch.equal(cpu.linear(x, matrix), flat.view(2, 3, 17))
    assert torch.equal(cpu.linear(x[1, 2], matrix), flat[5])
    assert torch.equal(cpu.linear(x.transpose(0, 1), matrix), flat.view(2, 3, 17).transpose(0, 1))
    for shape in ((0, 64), (2, 0, 64)):
        assert cpu.linear(torch.empty(shape), matrix).shape == (*shape[:-1], 17)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_result_has_the_dtype_asked_for(kind: str) -> None:
    matrix, _ = random_floats(kind, 17, 64, seed=1)
    x = torch.randn(3, 64, generator=generator(1)).bfloat16()
    wide = cpu.linear(x, matrix, dtype=torch.float32)
    assert_same_bits(cpu.linear(x, matrix), wide.bfloat16())
    assert_same_bits(cpu.linear(x.float(), matrix), wide)
    assert_same_bits(cpu.linear(x.float(), matrix, dtype=torch.bfloat16), wide.bfloat16())


def test_bytes_of_a_product_are_codes_and_scales() -> None:
    assert random_integers(10, 128, 4, 32, seed=0).matrix.num_bytes == 10 * (128 // 2 + 4 * 2)
    assert random_floats("bf16", 10, 40, seed=0)[0].num_bytes == 10 * 40 * 2


def words(rows: int, columns: int, bits: int = 4) -> Tensor:
    return pack(torch.zeros(rows, columns, dtype=torch.int8), bits)


E4M3 = torch.zeros(32, 48).to(torch.float8_e4m3fn)
BAD_MATRICES: dict[str, Callable[[], Any]] = {
    "3 bits": lambda: cpu.Matrix(words(4, 64), torch.ones(4, 2), bits=3, columns=64, group=32),
    "no bits": lambda: cpu.Matrix(words(4, 64), torch.ones(4, 2), columns=64, group=32),
    "no scales": lambda: cpu.Matrix(words(4, 64), bits=4, columns=64, group=32),
    "no group": lambda: cpu.Matrix(words(4, 64), torch.ones(4, 2), bits=4, columns=64),
    "other columns": lambda: cpu.Matrix(words(4, 64), torch.ones(4, 3), bits=4, columns=96, group=32),
    "few scales": lambda: cpu.Matrix(words(4, 64), torch.ones(4, 1), bits=4, columns=64, group=32),
    "scales of other rows": lambda: cpu.Matrix(words(4, 64), torch.ones(3, 2), bits=4, columns=64, group=32),
    "strided words": lambda: cpu.Matrix(words(4, 64).T.contiguous().T, torch.ones(4, 2), bits=4, columns=64,
                                        group=32),
    "strided scales": lambda: cpu.Matrix(words(4, 64), torch.ones(2, 4).T, bits=4, columns=64, group=32),
    "strided floats": lambda: cpu.Matrix(torch.ones(4, 6)[:, ::2]),
    "fp64": lambda: cpu.Matrix(torch.ones(4, 6, dtype=torch.float64)),
    "int64": lambda: cpu.Matrix(torch.ones(4, 6, dtype=torch.int64)),
    "e4m3 without scales": lambda: cpu.Matrix(E4M3, group=16),
    "e4m3 with bf16 scales": lambda: cpu.Matrix(E4M3, torch.ones(2, 3).bfloat16(), group=16),
    "e4m3 with few scales": lambda: cpu.Matrix(E4M3, torch.ones(2, 2), group=16),
    "e4m3 in blocks of 8": lambda: cpu.Matrix(E4M3, torch.ones(4, 6), group=8),
    "fp64 scales": lambda: cpu.Matrix(words(4, 64), torch.ones(4, 2).double(), bits=4, columns=64, group=32),
    "not on the CPU": lambda: cpu.Matrix(torch.ones(4, 6, device="meta")),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MATRICES)
def test_sizes_that_contradict_each_other_are_refused(case: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        BAD_MATRICES[case]()


def test_a_vector_is_no_matrix() -> None:
    with pytest.raises(ValueError, match=r"\w"):
        cpu.Matrix(torch.ones(4))


@pytest.mark.parametrize(
    ("x", "options"),
    [
        (torch.ones(2, 63), {}),
        (torch.ones(2, 64).half(), {}),
        (torch.ones(2, 64).long(), {}),
        (torch.ones(2, 64, device="meta"), {}),
        (torch.ones(2, 64), {"bias": torch.ones(16)}),
        (torch.ones(2, 64), {"bias": torch.ones(17).bfloat16()}),
        (torch.ones(2, 64), {"norm": torch.ones(17)}),
        (torch.ones(2, 64), {"norm": torch.ones(128)[::2]}),
        (torch.ones(2, 64), {"add": torch.ones(2, 16)}),
        (torch.ones(2, 64), {"add": torch.ones(2, 17).bfloat16()}),
        (torch.ones(2, 64), {"add": torch.ones(17, 2).T}),
        (torch.ones(2, 64), {"dtype": torch.float64}),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(x: Tensor, options: dict[str, Any]) -> None:
    matrix = random_integers(17, 64, 4, 32, seed=0).matrix
    with pytest.raises(ValueError, match=r"\w"):
        cpu.linear(x, matrix, **options)


def test_an_unknown_instruction_set_is_refused() -> None:
    from glm5.kernels import _cpu

    before = _cpu.instruction_set()
    with pytest.raises(ValueError, match="avx1024"):
        _cpu.use_instruction_set("avx1024")
    assert _cpu.instruction_set() == before


# --- forked processes -------------------------------------------------------------------------------


def exit_code_of_child(action: Callable[[], object]) -> int:
    """0 when a forked child does `action` within a second."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        code = 3
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize(
    "action", ["a product", "a change of threads"],
)  # fmt: skip
def test_a_forked_child_goes_on(action: str) -> None:
    matrix, x = random_integers(300, 256, 4, 32, seed=0).matrix, torch.ones(2, 256)
    with on_threads(3):
        wanted = cpu.linear(x, matrix)  # the threads are there now

        def act() -> None:
            if action == "a change of threads":
                cpu.set_threads(2)
            assert torch.equal(cpu.linear(x, matrix), wanted)

        assert exit_code_of_child(act) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_child_forked_while_another_thread_computes_may_set_threads() -> None:
    matrix, x = random_integers(512, 512, 4, 32, seed=0).matrix, torch.ones(64, 512)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            cpu.linear(x, matrix)

    with on_threads(2):
        thread = threading.Thread(target=work)
        thread.start()
        try:
            assert [exit_code_of_child(lambda: cpu.set_threads(1)) for _ in range(20)] == [0] * 20
        finally:
            stop.set()
            thread.join()


@quick
@given(st.integers(1, 9), st.integers(1, 70), activation_dtypes, seeds)
def test_rows_are_normalized_as_the_module_does(
    rows: int, columns: int, dtype: torch.dtype, seed: int
) -> None:
    module = RMSNorm(columns, 1e-5)
    module.weight.data = (torch.rand(columns, generator=generator(seed)) + 0.5).to(dtype)
    x = activations(rows, columns, seed, dtype)
    with torch.inference_mode():
        wanted = module(x).float()
        found = on_each(INSTRUCTION_SETS, lambda: cpu.rms_norm(x, module.weight.float(), 1e-5))
        alone = torch.cat([cpu.rms_norm(row[None], module.weight.float(), 1e-5) for row in x])
    unit = 2.0**-7 if dtype == torch.bfloat16 else 2e-6  # a normalized value may fall to either side
    for name, out in found.items():
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), wanted, rtol=unit, atol=1e-30, msg=name)
    assert_same_bits(alone, found[INSTRUCTION_SETS[0]])


# --- an embedding -----------------------------------------------------------------------------------


@quick
@given(integer_matrices(), st.lists(st.integers(0, 10**6), max_size=40), activation_dtypes)
def test_rows_are_taken_as_they_unpack(made: Integers, numbers: list[int], dtype: torch.dtype) -> None:
    ids = torch.tensor(numbers, dtype=torch.int64) % made.codes.shape[0]
    wanted = made.weight.float()[ids].to(dtype)
    for name, out in on_each(INSTRUCTION_SETS, lambda: cpu.take_rows(ids, made.matrix, dtype)).items():
        assert torch.equal(out, wanted), name


@pytest.mark.parametrize("bad", [-1, 5, 2**40])
def test_a_row_that_is_none_is_refused(bad: int) -> None:
    made = random_integers(5, 64, 4, 32, 0)
    with pytest.raises(IndexError, match=f"row {bad} of 5"):
        cpu.take_rows(torch.tensor([0, bad]), made.matrix, torch.float32)
