"""Attention over cached rows and DSA's choice of them: MLA in its absorbed form, GQA, index scores.

Letters: N queries, H heads, G key/value heads, B cache rows, S slots, C latent + rotary, K chosen slots.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from glm5.kernels.cpu.matrix import Matrix
from glm5.kernels.cpu.native import ACTIVATIONS, fill, here, inside, library, need, whole
from glm5.kernels.slots import Slots

MAX_INDEX_HEADS, MAX_INDEX_WIDTH = 64, 256


def attend(
    q_NHq: Tensor, kv_b: Matrix, turns_Nr: Tensor, cache_BSC: Tensor, rows: Tensor, chosen: Slots, *,
    nope: int, value: int, scale: float, exact: bool = False,
) -> Tensor:  # fmt: skip
    """Absorbed MLA attention of N queries, [N, H, value] in the dtype of q.

    q: [N, H, nope + rotary], not yet rotated. turns: complex64 [N, rotary / 2]. cache: [B, S, latent +
    rotary], any row stride. rows: int32 [N], the cache row of each query. exact: what the heads mixed meets
    integer weights unrounded. A query that sees nothing gets zeros.

    Raises ValueError when sizes, dtypes, rows or slots contradict each other.
    """
    count, heads, query = q_NHq.shape
    rotary = query - nope
    need(here(q_NHq, "queries").dtype in ACTIVATIONS, f"queries are {q_NHq.dtype}, not fp32 or bf16")
    need(nope >= 0 and value > 0 and heads > 0, f"heads of {nope} + {rotary} and {value} are no heads")
    need(rotary >= 0 and rotary % 2 == 0, f"queries are {query} wide, of which {nope} are not rotated")
    need(kv_b.rows == heads * (nope + value), f"kv_b has {kv_b.rows} rows, not {heads} x ({nope} + {value})")
    need(
        cache_BSC.dim() == 3 and cache_BSC.shape[2] == kv_b.columns + rotary,
        "cache is not [B, S, latent + rotary]",
    )
    whole(turns_Nr.contiguous(), (count, rotary // 2), torch.complex64, "turns")
    q_NHq, turns_Nr = q_NHq.contiguous(), turns_Nr.contiguous()
    out = torch.empty(count, heads, value, dtype=q_NHq.dtype)
    cached = _cached(cache_BSC, cache_BSC, kv_b.columns + rotary, kv_b.columns)
    call = fill(
        library.AttendCall(), q=q_NHq, turns=turns_Nr, out=out, bf16=q_NHq.dtype == torch.bfloat16,
        exact=exact, count=count, heads=heads, nope=nope, rotary=rotary, latent=kv_b.columns, value=value,
        scale=scale, cache=cached, seen=_seen(rows, chosen, count, cache_BSC.shape[0], cache_BSC.shape[1]),
    )  # fmt: skip
    library.attend(call, kv_b.handle)
    return out


def attend_grouped(
    q_NHd: Tensor, keys_BSGd: Tensor, values_BSGv: Tensor, rows: Tensor, chosen: Slots, *, scale: float
) -> Tensor:
    """Grouped-query attention of N queries, fp32 [N, H, v].

    q: fp32 [N, H, d], rotated. keys [B, S, G, d] and values [B, S, G, v]: fp32 or bf16 alike, any row
    stride; G divides H. rows, chosen: as in `attend`.

    Raises ValueError when sizes, dtypes, rows or slots contradict each other.
    """
    count, heads, width = q_NHd.shape
    need(here(q_NHd, "queries").dtype == torch.float32, f"queries are {q_NHd.dtype}, not fp32")
    need(keys_BSGd.dim() == values_BSGv.dim() == 4, "keys and values are not [B, S, G, d]")
    need(
        keys_BSGd.shape[:3] == values_BSGv.shape[:3] and keys_BSGd.shape[3] == width, "keys have other sizes"
    )
    groups, value = keys_BSGd.shape[2], values_BSGv.shape[3]
    need(groups > 0 and heads % groups == 0, f"{heads} heads do not share {groups} key heads")
    q_NHd = q_NHd.contiguous()
    out = torch.empty(count, heads, value)
    call = fill(
        library.GroupedCall(), q=q_NHd, out=out, count=count, heads=heads, kv_heads=groups, scale=scale,
        cache=_cached(keys_BSGd, values_BSGv, width, value),
        seen=_seen(rows, chosen, count, keys_BSGd.shape[0], keys_BSGd.shape[1]),
    )  # fmt: skip
    library.attend_grouped(call)
    return out


def select(
    q_NHd: Tensor, turns_Nr: Tensor, weights_NH: Tensor, cache_BSd: Tensor, rows: Tensor, topk: int,
    visible_NS: Tensor | None = None, limits: Tensor | None = None,
) -> Slots:  # fmt: skip
    """The topk slots of largest index score; equal scores: the lowest slot.

    q: [N, H, d] with H <= 64 and d <= 256, not yet rotated. weights: fp32 [N, H], scaled.
    visible: bool [N, S]; None = every slot. limits: int32 [N], a query sees the first so many.

    Raises ValueError when sizes, dtypes or rows contradict each other.
    """
    count, heads, width = q_NHd.shape
    need(
        here(q_NHd, "index queries").dtype in ACTIVATIONS,
        f"index queries are {q_NHd.dtype}, not fp32 or bf16",
    )
    need(cache_BSd.dim() == 3 and cache_BSd.shape[2] == width, "index keys are not [B, S, d]")
    keys, rotary = cache_BSd.shape[1], 2 * turns_Nr.shape[-1]
    fits = heads <= MAX_INDEX_HEADS and width <= MAX_INDEX_WIDTH
    need(fits, f"{heads} index heads of {width} are more than {MAX_INDEX_HEADS} of {MAX_INDEX_WIDTH}")
    need(topk > 0, f"topk is {topk}")
    need(rotary <= width, f"{rotary} of {width} dimensions cannot be rotated")
    _check_rows(cache_BSd, "index keys")
    inside(whole(rows, (count,), torch.int32, "rows"), 0, cache_BSd.shape[0], "rows")
    q_NHd, turns_Nr = q_NHd.contiguous(), turns_Nr.contiguous()
    whole(turns_Nr, (count, rotary // 2), torch.complex64, "turns")
    whole(weights_NH, (count, heads), torch.float32, "index weights")
    if visible_NS is not None:
        visible_NS = whole(visible_NS.contiguous(), (count, keys), torch.bool, "visible")
    if limits is not None:
        inside(whole(limits, (count,), torch.int32, "limits"), 0, keys + 1, "limits")
    _, pointers = _one_page_a_row(len(cache_BSd))
    slots = torch.zeros(count, topk, dtype=torch.int32)
    counts = torch.empty(count, dtype=torch.int32)
    call = fill(
        library.SelectCall(), q=q_NHd, bf16=q_NHd.dtype == torch.bfloat16, turns=turns_Nr, weights=weights_NH,
        cache=cache_BSd, bf16_cache=cache_BSd.dtype == torch.bfloat16,
        page_bytes=cache_BSd.stride(0) * cache_BSd.element_size(), count=count, heads=heads, width=width,
        rotary=rotary, keys=keys, topk=topk, rows=rows, visible=visible_NS, limits=limits, slots=slots,
        counts=counts, pages=fill(library.Pages(), tables=pointers),
    )  # fmt: skip
    library.select(call)
    return Slots(slots, counts)


def _check_rows(cache: Tensor, name: str) -> None:
    """Rows [B, S, ...] that are contiguous within a batch row, fp32 or bf16 on the CPU."""
    need(
        cache.dtype in ACTIVATIONS and cache.device.type == "cpu",
        f"{name} are {cache.dtype}, not fp32 or bf16",
    )
    need(cache.shape[0] > 0 and cache.shape[1] > 0, f"the {name} are {list(cache.shape)}: no slot")
    inner = cache[0]
    need(inner.is_contiguous(), f"the {name} of a row are not contiguous")


@cache
def _one_page_a_row(rows: int) -> tuple[Tensor, Tensor]:
    """Tables of sequences that lie in one page each, and the address of each table."""
    tables = torch.arange(rows, dtype=torch.int32)
    return tables, tables.data_ptr() + 4 * torch.arange(rows)


def _cached(keys: Tensor, values: Tensor, key_width: int, value_width: int) -> object:
    _check_rows(keys, "keys")
    _check_rows(values, "values")
    need(keys.dtype == values.dtype, "keys and values differ in dtype")
    item = keys.element_size()
    _, pointers = _one_page_a_row(len(keys))
    return fill(
        library.CachedRows(), keys=keys, values=values, bf16=keys.dtype == torch.bfloat16,
        key_width=key_width, value_width=value_width,
        key_stride=keys[0, 0].numel(), value_stride=values[0, 0].numel(),
        key_page_bytes=keys.stride(0) * item, value_page_bytes=values.stride(0) * item,
        pages=fill(library.Pages(), tables=pointers),
    )  # fmt: skip


def _seen(rows: Tensor, chosen: Slots, count: int, cache_rows: int, capacity: int) -> object:
    slots, counts = chosen
    inside(whole(rows, (count,), torch.int32, "rows"), 0, cache_rows, "rows")
    room = capacity if slots is None else slots.shape[-1]
    inside(whole(counts, (count,), torch.int32, "counts"), 0, room + 1, "counts")
    if slots is not None:
        whole(slots, (count, room), torch.int32, "slots")
        used = torch.arange(room) < counts.unsqueeze(1)
        inside(slots[used], 0, capacity, "slots")
    return fill(library.SeenSlots(), rows=rows, slots=slots, counts=counts, room=0 if slots is None else room)
