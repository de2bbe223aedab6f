"""The native CPU library, with tensors instead of addresses.

Every shape and dtype is checked here, once, when a matrix or a layer is made; a call then costs a
microsecond. Tensors given to a matrix stay alive with it and must not be resized.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from glm5.formats.packing import words_per_row
from glm5.kernels import _cpu  # type: ignore[attr-defined]  # compiled from src/

_FLOAT_CODES = {torch.bfloat16: 16, torch.float16: 17, torch.float32: 32}
_E4M3 = 9
MAX_INDEX_HEADS = 64
_ACTIVATIONS = (torch.float32, torch.bfloat16)


class Matrix:
    """A weight matrix [rows, columns] in the layout of the checkpoint.

    weight: bf16, fp16 or fp32 [rows, columns]; e4m3 [rows, columns] with `scales` fp32 one a block;
        or int32 words of 4- or 8-bit codes with `scales` bf16/fp16/fp32 [rows, groups].
    bits, columns: of integer codes. group: columns that share a scale (a block's side for e4m3).

    Raises ValueError when sizes contradict each other: the caller has checked its files.
    """

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor | None = None,
        *,
        bits: int = 0,
        columns: int = 0,
        group: int = 0,
    ) -> None:
        _need(weight.dim() == 2, f"weights have {weight.dim()} dimensions, not 2")
        rows = weight.shape[0]
        _need(
            weight.device.type == "cpu" and weight.is_contiguous(), "weights must be contiguous, on the CPU"
        )
        scale_code = 0
        if weight.dtype == torch.int32:
            _need(bits in (4, 8), f"codes have {bits} bits, not 4 or 8")
            _need(weight.shape[1] == words_per_row(columns, bits), "packed width and columns disagree")
            _need(scales is not None and group > 0, "integer codes need scales and a group")
            assert scales is not None
            _need(tuple(scales.shape) == (rows, -(-columns // group)), "scales are not [rows, groups]")
            _need(scales.dtype in _FLOAT_CODES, f"scales are {scales.dtype}")
            code, scale_code = bits, _FLOAT_CODES[scales.dtype]
        elif weight.dtype == torch.float8_e4m3fn:
            columns = weight.shape[1]
            _need(scales is not None and group > 0 and group % 16 == 0, "e4m3 needs scales and whole blocks")
            assert scales is not None
            wanted = (-(-rows // group), -(-columns // group))
            _need(tuple(scales.shape) == wanted and scales.dtype == torch.float32, "block scales are wrong")
            code, scale_code = _E4M3, 32
        else:
            _need(weight.dtype in _FLOAT_CODES, f"weights are {weight.dtype}")
            columns, code, group = weight.shape[1], _FLOAT_CODES[weight.dtype], 0
        if scales is not None:
            _need(scales.device.type == "cpu" and scales.is_contiguous(), "scales must be contiguous")
        self.weight, self.scales = weight, scales
        self.rows, self.columns, self.bits = rows, columns, bits if weight.dtype == torch.int32 else 0
        self.group = group
        self.handle = _cpu.Matrix(
            code,
            rows,
            columns,
            group,
            weight.data_ptr(),
            scale_code,
            0 if scales is None else scales.data_ptr(),
        )

    @property
    def block(self) -> int:
        """Columns whose activations share an int8 scale; 0 = this matrix takes float activations."""
        return self.handle.block

    @property
    def num_bytes(self) -> int:
        """Bytes that one product with it reads."""
        scales = 0 if self.scales is None else self.scales.numel() * self.scales.element_size()
        return self.weight.numel() * self.weight.element_size() + scales


def linear(
    x: Tensor,
    matrix: Matrix,
    *,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    exact: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """W norm(x) + bias + add; x [..., columns] fp32 or bf16, the result [..., rows] in `dtype` (x's).

    norm: fp32 weights of an RMSNorm taken first. exact: integer weights meet unrounded activations.
    """
    x = _activations(x, matrix.columns)
    dtype = dtype or x.dtype
    _need(dtype in _ACTIVATIONS, f"results are {dtype}, not fp32 or bf16")
    out = torch.empty(*x.shape[:-1], matrix.rows, dtype=dtype)
    if add is not None:
        _need(
            add.shape == out.shape and add.dtype == dtype and add.is_contiguous(),
            "add must be like the result",
        )
    _cpu.linear(
        matrix.handle, x.data_ptr(), x.dtype == torch.bfloat16, x.numel() // matrix.columns, out.data_ptr(),
        dtype == torch.bfloat16, _floats(bias, matrix.rows), 0 if add is None else add.data_ptr(),
        _floats(norm, matrix.columns), eps, exact,
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, like x (fp32 or bf16).

    weight: fp32 [D]. In bf16 the normalized value is rounded before the weight is applied, as
    `RMSNorm` does it. A row's result does not depend on the rows beside it.
    """
    columns = weight.numel()
    x = _activations(x, columns)
    out = torch.empty_like(x)
    _cpu.rms_norm(
        x.data_ptr(), x.dtype == torch.bfloat16, x.numel() // columns, columns, _floats(weight, columns),
        eps, out.data_ptr(),
    )  # fmt: skip
    return out


class MoeLayer:
    """A feed-forward layer in one call: router, routed experts, shared expert; or a dense network.

    experts, shared: (gate, up, down). router: weight [E, D] and fp32 bias [E], both kept alive.
    """

    def __init__(
        self,
        hidden: int,
        experts: Sequence[tuple[Matrix, Matrix, Matrix]] = (),
        shared: tuple[Matrix, Matrix, Matrix] | None = None,
    ) -> None:
        self.hidden = hidden
        self.handle = _cpu.MoeLayer(hidden)
        self._kept: list[object] = [*experts, shared]
        self.num_experts, self.topk = len(experts), 0
        for gate, up, down in experts:
            _check_feed(gate, up, down, hidden)
            same = [_kind(matrix) for matrix in (gate, up, down)] == [_kind(m) for m in experts[0]]
            _need(same, "the experts of a layer must be of one kind")
            self.handle.add_expert(gate.handle, up.handle, down.handle)
        if shared is not None:
            _check_feed(*shared, hidden)
            self.handle.set_shared(*(matrix.handle for matrix in shared))

    def set_router(
        self, weight: Matrix, bias: Tensor, *, topk: int, groups: int = 1, topk_groups: int = 1,
        normalize: bool = True, factor: float = 1.0,
    ) -> None:  # fmt: skip
        _need((weight.rows, weight.columns) == (self.num_experts, self.hidden), "the router has other sizes")
        _need(
            bias.shape == (self.num_experts,) and 0 < topk <= self.num_experts, "router bias or topk is wrong"
        )
        _need(self.num_experts % groups == 0 and 0 < topk_groups <= groups, "router groups are wrong")
        _need(topk <= self.num_experts // groups * topk_groups, "the groups hold fewer experts than topk")
        self._kept.append(weight)
        self.topk = topk
        self.handle.set_router(
            weight.handle, bias.float().tolist(), topk, groups, topk_groups, normalize, factor
        )

    def __call__(
        self,
        x: Tensor,
        *,
        routing: tuple[Tensor, Tensor] | None = None,
        add: Tensor | None = None,
        norm: Tensor | None = None,
        eps: float = 0.0,
        exact: bool = False,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """add + experts(norm(x)) + shared(norm(x)), like x [..., hidden].

        routing: (ids [T, K], weights [T, K]) in place of the layer's own router.
        chosen: int32 [T, K], filled with the experts that ran.
        """
        x = _activations(x, self.hidden)
        tokens = x.numel() // self.hidden
        out = torch.empty_like(x)
        if add is not None:
            _need(add.shape == x.shape and add.dtype == x.dtype and add.is_contiguous(), "add must be like x")
        ids = weights = None
        if routing is not None:
            ids, weights = routing[0].to(torch.int32).contiguous(), routing[1].float().contiguous()
            _need(ids.shape == weights.shape == (tokens, self.topk), "routing is not [tokens, topk]")
            inside = not tokens or (int(ids.min()) >= 0 and int(ids.max()) < self.num_experts)
            _need(inside, "routing names an expert that is not there")
        else:
            _need(self.num_experts == 0 or self.topk > 0, "the layer has no router")
        told = chosen
        if chosen is not None:
            fits = chosen.shape == (tokens, self.topk) and chosen.dtype == torch.int32
            _need(fits, "chosen is not int32 [T, K]")
            told = chosen if chosen.is_contiguous() else torch.empty(tokens, self.topk, dtype=torch.int32)
        _cpu.moe(
            self.handle, x.data_ptr(), x.dtype == torch.bfloat16, tokens, out.data_ptr(),
            0 if add is None else add.data_ptr(), _floats(norm, self.hidden), eps, exact,
            0 if ids is None else ids.data_ptr(), 0 if weights is None else weights.data_ptr(),
            0 if told is None else told.data_ptr(),
        )  # fmt: skip
        if chosen is not None and told is not None and told is not chosen:
            chosen.copy_(told)
        return out


class Slots(NamedTuple):
    """Chosen cache slots of N queries: int32 [N, K] in rising order, of which `counts` [N] are valid."""

    slots: Tensor | None  # None: the first `counts` slots
    counts: Tensor


def attend(
    q_NHq: Tensor, kv_b: Matrix, turns_Nr: Tensor, cache_BSC: Tensor, rows: Tensor, chosen: Slots, *,
    nope: int, value: int, scale: float, exact: bool = False,
) -> Tensor:  # fmt: skip
    """Absorbed MLA attention of N queries, [N, H, value] in the dtype of q.

    q: [N, H, nope + rotary], not yet rotated. turns: complex64 [N, rotary / 2]. cache: [B, S, latent +
    rotary], any row stride. rows: int32 [N], the cache row of each query. exact: what the heads mixed meets
    integer weights unrounded.
    """
    count, heads, query = q_NHq.shape
    rotary = query - nope
    _need(kv_b.rows == heads * (nope + value) and kv_b.columns % 16 == 0, "kv_b has other sizes")
    _need(cache_BSC.shape[2] == kv_b.columns + rotary and (kv_b.columns + rotary) % 16 == 0, "cache width")
    _need(turns_Nr.shape == (count, rotary // 2) and turns_Nr.dtype == torch.complex64, "turns are wrong")
    _need(cache_BSC.stride()[1:] == (cache_BSC.shape[2], 1), "cache rows are not contiguous")
    _need(rows.dtype == torch.int32 and chosen.counts.dtype == torch.int32, "rows and counts are int32")
    q_NHq, turns_Nr = q_NHq.contiguous(), turns_Nr.contiguous()
    out = torch.empty(count, heads, value, dtype=q_NHq.dtype)
    slots = chosen.slots
    _cpu.attend(
        kv_b.handle, q_NHq.data_ptr(), q_NHq.dtype == torch.bfloat16, turns_Nr.data_ptr(),
        cache_BSC.data_ptr(), cache_BSC.dtype == torch.bfloat16,
        cache_BSC.stride(0) * cache_BSC.element_size(), out.data_ptr(), count, heads, nope, rotary, value,
        rows.data_ptr(), 0 if slots is None else slots.data_ptr(), chosen.counts.data_ptr(),
        0 if slots is None else slots.shape[1], scale, exact,
    )  # fmt: skip
    return out


def attend_prompt(
    q_BTHo: Tensor, k_BSGo: Tensor, v_BSGv: Tensor, *, scale: float, q_shared_BTHr: Tensor | None = None,
    k_shared_BSr: Tensor | None = None, causal: bool = False, visible_BTS: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention in fp32 of many queries; returns [B, T, H, v] in the dtype of `q`.

    q [B, T, H, o], k [B, S, G, o], v [B, S, G, v], fp32 or bf16 alike; G divides H. With the shared
    part a score is q . k + q_shared . k_shared, one key of width r for all heads (fp32 or bf16).
    causal: the queries are the last T of the S slots. visible: bool [B or 1, T, S] instead. A query
    that sees nothing gets zeros. All widths are multiples of 16; the last dimensions are contiguous.
    """
    batch, queries, heads, own = q_BTHo.shape
    keys, kv_heads, value = k_BSGo.shape[1], k_BSGo.shape[2], v_BSGv.shape[3]
    shared = 0 if q_shared_BTHr is None else q_shared_BTHr.shape[3]
    parts = [q_BTHo, k_BSGo, v_BSGv] + ([] if q_shared_BTHr is None else [q_shared_BTHr])
    _need(all(p.dtype == q_BTHo.dtype and p.dtype in _ACTIVATIONS for p in parts), "dtypes differ")
    _need(k_BSGo.shape == (batch, keys, kv_heads, own) and heads % kv_heads == 0, "keys have other sizes")
    _need(v_BSGv.shape[:3] == k_BSGo.shape[:3], "values have other sizes")
    _need(all(width % 16 == 0 for width in (own, shared, value)), "widths are no multiples of 16")
    _need(not causal or (visible_BTS is None and queries <= keys), "causal with a mask, or too few keys")
    if q_shared_BTHr is not None:
        assert k_shared_BSr is not None
        _need(q_shared_BTHr.shape == (batch, queries, heads, shared), "shared queries have other sizes")
        _need(k_shared_BSr.shape == (batch, keys, shared), "shared keys have other sizes")
        _need(k_shared_BSr.dtype in _ACTIVATIONS, "shared keys are fp32 or bf16")
        parts.append(k_shared_BSr)
    _need(all(p.stride(-1) == 1 and p.device.type == "cpu" for p in parts), "last dimensions are contiguous")
    if visible_BTS is not None:
        visible_BTS = visible_BTS.contiguous()
        _need(visible_BTS.shape in ((batch, queries, keys), (1, queries, keys)), "visible is [B or 1, T, S]")
        _need(visible_BTS.dtype == torch.bool, "visible is bool")
    out = torch.empty(batch, queries, heads, value, dtype=q_BTHo.dtype)

    def place(tensor: Tensor | None, dims: int) -> tuple[int, list[int]]:
        return (0, [0] * dims) if tensor is None else (tensor.data_ptr(), list(tensor.stride()[:dims]))

    per_row = 0 if visible_BTS is None or visible_BTS.shape[0] == 1 else queries * keys
    shared_bf16 = k_shared_BSr is not None and k_shared_BSr.dtype == torch.bfloat16
    _cpu.attend_prompt(
        *place(q_BTHo, 3), *place(q_shared_BTHr, 3), *place(k_BSGo, 3), *place(k_shared_BSr, 2),
        *place(v_BSGv, 3), out.data_ptr(), q_BTHo.dtype == torch.bfloat16, shared_bf16,
        [batch, queries, keys, heads, kv_heads, own, shared, value], causal,
        0 if visible_BTS is None else visible_BTS.data_ptr(), per_row, scale,
    )  # fmt: skip
    return out


def select(
    q_NHd: Tensor, turns_Nr: Tensor, weights_NH: Tensor, cache_BSd: Tensor, rows: Tensor, topk: int,
    visible_NS: Tensor | None = None,
) -> Slots:  # fmt: skip
    """The topk slots of largest index score; equal scores: the lowest slot. S > topk.

    q: [N, H, d] with H <= 64, not yet rotated. weights: fp32 [N, H], scaled.
    visible: bool [N, S]; None = every slot.
    """
    count, heads, width = q_NHd.shape
    keys = cache_BSd.shape[1]
    _need(heads <= MAX_INDEX_HEADS and width % 16 == 0 and width <= 256, "index heads of this shape")
    _need(cache_BSd.stride()[1:] == (width, 1), "cache rows are not contiguous")
    _need(weights_NH.dtype == torch.float32 and weights_NH.is_contiguous(), "weights are fp32")
    q_NHd, turns_Nr = q_NHd.contiguous(), turns_Nr.contiguous()
    slots = torch.empty(count, topk, dtype=torch.int32)
    counts = torch.empty(count, dtype=torch.int32)
    if visible_NS is not None:
        visible_NS = visible_NS.contiguous()
        _need(visible_NS.shape == (count, keys) and visible_NS.dtype == torch.bool, "visible is bool [N, S]")
    _cpu.select(
        q_NHd.data_ptr(), q_NHd.dtype == torch.bfloat16, turns_Nr.data_ptr(), weights_NH.data_ptr(),
        cache_BSd.data_ptr(), cache_BSd.dtype == torch.bfloat16,
        cache_BSd.stride(0) * cache_BSd.element_size(), count, heads, width, 2 * turns_Nr.shape[1], keys,
        topk, rows.data_ptr(), 0 if visible_NS is None else visible_NS.data_ptr(), slots.data_ptr(),
        counts.data_ptr(),
    )  # fmt: skip
    return Slots(slots, counts)


class Rounded(NamedTuple):
    """Packed codes int32 [rows, words], scales bf16 [rows, groups], and what rounding lost."""

    words: Tensor
    scales: Tensor
    error: float  # sum of squared differences
    energy: float  # sum of squares of the weights


def round_weights(
    weight: Tensor, *, bits: int, group: int, importance: Tensor | None = None, search: bool = True
) -> Rounded:
    """Finite float weights [rows, columns] to symmetric codes with a searched scale a group.

    importance: fp32 [columns], how much an error in a column counts. A scale may be negative.
    Raises ValueError when the group is no multiple of 32 or does not divide the width.
    """
    rows, columns = weight.shape
    _need(weight.dtype in _FLOAT_CODES and weight.is_contiguous(), f"weights are {weight.dtype}")
    _need(bits in (4, 8), f"codes have {bits} bits, not 4 or 8")
    _need(
        group > 0 and group % 32 == 0 and columns % group == 0,
        f"{columns} columns are no whole groups of {group}",
    )
    words = torch.empty(rows, words_per_row(columns, bits), dtype=torch.int32)
    scales = torch.empty(rows, columns // group, dtype=torch.bfloat16)
    error, energy = _cpu.round_weights(
        weight.data_ptr(), _FLOAT_CODES[weight.dtype], rows, columns, group, bits,
        _floats(importance, columns), search and bits == 4, words.data_ptr(), scales.data_ptr(),
    )  # fmt: skip
    return Rounded(words, scales, error, energy)


def all_finite(values: Tensor) -> bool:
    """Is nothing in a contiguous bf16, fp16 or fp32 tensor infinite or NaN?"""
    _need(values.dtype in _FLOAT_CODES and values.is_contiguous(), f"values are {values.dtype}")
    return bool(_cpu.all_finite(values.data_ptr(), values.numel(), _FLOAT_CODES[values.dtype]))


def instruction_sets() -> list[str]:
    """What this machine can run, best first; the environment's GLM5_ISA picks another."""
    return _cpu.instruction_sets()


def set_threads(count: int) -> None:
    _cpu.set_threads(count)


def threads() -> int:
    return _cpu.threads()


def _activations(x: Tensor, columns: int) -> Tensor:
    _need(x.dtype in _ACTIVATIONS and x.device.type == "cpu", f"activations are {x.dtype}, not fp32 or bf16")
    _need(x.shape[-1] == columns, f"activations are {x.shape[-1]} wide, the weights {columns}")
    return x.contiguous()


def _floats(values: Tensor | None, count: int) -> int:
    """The address of an fp32 vector; 0 = none."""
    if values is None:
        return 0
    _need(
        values.dtype == torch.float32 and values.numel() == count and values.is_contiguous(), "not fp32 [n]"
    )
    return values.data_ptr()


def _kind(matrix: Matrix) -> tuple[object, ...]:
    return matrix.rows, matrix.columns, matrix.bits, matrix.group, matrix.weight.dtype


def _check_feed(gate: Matrix, up: Matrix, down: Matrix, hidden: int) -> None:
    sizes = [(m.rows, m.columns) for m in (gate, up, down)]
    width = gate.rows
    _need(sizes == [(width, hidden), (width, hidden), (hidden, width)], f"gate, up, down are {sizes}")


def _need(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


_cpu.set_threads(int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()))
