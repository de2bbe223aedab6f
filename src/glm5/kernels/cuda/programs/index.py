"""Program of `glm5.kernels.cuda.index`, where the letters are said."""

# No `from __future__ import annotations` in files with programs: Triton reads their annotations.
import triton
import triton.language as tl


@triton.jit
def index(
    q_ptr, weights_ptr, cache_ptr, rows_ptr, visible_ptr, order_ptr, heads, keys, stride_row, stride_slot,
    width: tl.constexpr, width_block: tl.constexpr, head_block: tl.constexpr, slot_block: tl.constexpr,
    product: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(1)
    slot = tl.program_id(0) * slot_block + tl.arange(0, slot_block)
    head, column = tl.arange(0, head_block), tl.arange(0, width_block)
    in_keys, in_heads, in_width = slot < keys, head < heads, column < width
    cache_ptr += tl.load(rows_ptr + query).to(tl.int64) * stride_row
    at = slot.to(tl.int64)[:, None] * stride_slot + column[None, :]
    key = tl.load(cache_ptr + at, mask=in_keys[:, None] & in_width[None, :], other=0.0).to(product)
    at = (query * heads + head)[:, None] * width + column[None, :]
    q = tl.load(q_ptr + at, mask=in_heads[:, None] & in_width[None, :], other=0.0).to(product)
    weight = tl.load(weights_ptr + query * heads + head, mask=in_heads, other=0.0)
    products = tl.maximum(tl.dot(key, tl.trans(q), input_precision="tf32x3"), 0.0)
    score = tl.sum(products * weight[None, :], axis=1)
    score = tl.where(score == 0.0, 0.0, score)  # -0 is equal to 0
    bits = score.to(tl.int32, bitcast=True)
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order = (rising.to(tl.int64) << 32) | (0xFFFFFFFF - slot.to(tl.int64))
    seen = in_keys
    if visible_ptr is not None:
        at = query.to(tl.int64) * keys + slot
        seen = tl.load(visible_ptr + at, mask=in_keys, other=0) != 0
    unseen = tl.full((slot_block,), 1, tl.int64) << 63
    tl.store(order_ptr + query.to(tl.int64) * keys + slot, tl.where(seen, order, unseen), mask=in_keys)
