"""Programs of `glm5.kernels.cuda.mla`, where the letters are said."""

# No `from __future__ import annotations` in files with programs: Triton reads their annotations.
import triton
import triton.language as tl


@triton.jit
def attend_chunk(
    q_ptr, cache_ptr, rows_ptr, slots_ptr, visible_ptr, counts_ptr, sums_ptr, peaks_ptr, masses_ptr,
    heads, reach, stride_row, stride_slot, scale_log2, latent: tl.constexpr, rotary: tl.constexpr,
    latent_block: tl.constexpr, rotary_block: tl.constexpr, head_block: tl.constexpr, chunk: tl.constexpr,
    slot_block: tl.constexpr, product: tl.constexpr,
):  # fmt: skip
    query, part = tl.program_id(0), tl.program_id(2)
    head = tl.program_id(1) * head_block + tl.arange(0, head_block)
    in_heads = head < heads
    latent_at, rotary_at = tl.arange(0, latent_block), tl.arange(0, rotary_block)
    in_latent, in_rotary = latent_at < latent, rotary_at < rotary
    count = tl.load(counts_ptr + query)
    cache_ptr += tl.load(rows_ptr + query).to(tl.int64) * stride_row
    q_at = (query * heads + head)[:, None] * (latent + rotary)
    q_latent = tl.load(
        q_ptr + q_at + latent_at[None, :], mask=in_heads[:, None] & in_latent[None, :], other=0.0
    ).to(product)  # fmt: skip
    q_rotary = tl.load(
        q_ptr + q_at + latent + rotary_at[None, :], mask=in_heads[:, None] & in_rotary[None, :], other=0.0
    ).to(product)  # fmt: skip
    peak = tl.full((head_block,), float("-inf"), tl.float32)
    mass = tl.zeros((head_block,), tl.float32)
    sums = tl.zeros((head_block, latent_block), tl.float32)
    for start in range(part * chunk, tl.minimum(part * chunk + chunk, count), slot_block):
        place = start + tl.arange(0, slot_block)
        here = place < count
        slot = place
        if slots_ptr is not None:
            slot = tl.load(slots_ptr + query * reach + place, mask=here, other=0)
        if visible_ptr is not None:
            here = here & (tl.load(visible_ptr + query.to(tl.int64) * reach + place, mask=here, other=0) != 0)
        at = slot.to(tl.int64)[:, None] * stride_slot
        keys = tl.load(
            cache_ptr + at + latent_at[None, :], mask=here[:, None] & in_latent[None, :], other=0.0
        ).to(product)  # fmt: skip
        rotated = tl.load(
            cache_ptr + at + latent + rotary_at[None, :], mask=here[:, None] & in_rotary[None, :], other=0.0
        ).to(product)  # fmt: skip
        scores = tl.dot(q_rotary, tl.trans(rotated), input_precision="ieee")
        scores = tl.dot(q_latent, tl.trans(keys), scores, input_precision="ieee") * scale_log2
        scores = tl.where(here[None, :], scores, float("-inf"))
        above = tl.maximum(peak, tl.max(scores, axis=1))
        base = tl.where(above == float("-inf"), 0.0, above)  # nothing seen yet: exp2(-inf - 0) is 0
        weights = tl.exp2(scores - base[:, None])
        kept = tl.exp2(peak - base)
        mass = mass * kept + tl.sum(weights, axis=1)
        sums = sums * kept[:, None]
        sums = tl.dot(weights.to(product), keys, sums, input_precision="ieee")
        peak = above
    at = (query * tl.num_programs(2) + part).to(tl.int64) * heads + head
    tl.store(peaks_ptr + at, peak, mask=in_heads)
    tl.store(masses_ptr + at, mass, mask=in_heads)
    seen = in_heads[:, None] & in_latent[None, :]
    tl.store(sums_ptr + at[:, None] * latent + latent_at[None, :], sums, mask=seen)


@triton.jit
def join_chunks(
    sums_ptr, peaks_ptr, masses_ptr, out_ptr, heads, chunks, latent: tl.constexpr, block: tl.constexpr
):
    query, head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, block)
    peak, mass = float("-inf"), 0.0
    sums = tl.zeros((block,), tl.float32)
    for part in range(chunks):
        at = (query * chunks + part).to(tl.int64) * heads + head
        part_peak, part_mass = tl.load(peaks_ptr + at), tl.load(masses_ptr + at)
        if part_mass > 0:
            above = tl.maximum(peak, part_peak)
            kept, added = tl.exp2(peak - above), tl.exp2(part_peak - above)
            mass = mass * kept + part_mass * added
            part_sums = tl.load(sums_ptr + at * latent + column, mask=column < latent, other=0.0)
            sums = sums * kept + part_sums * added
            peak = above
    out = (sums / tl.where(mass > 0, mass, 1.0)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (query * heads + head) * latent + column, out, mask=column < latent)
