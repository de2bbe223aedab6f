"""Absorbed MLA for few queries over the compressed cache: all of it, a mask of it, or DSA's slots.

The cache is read in chunks of fixed places, a program a chunk and 16 heads; the chunks' sums are then
joined in rising order. So a query's result depends on what it sees, not on its batch or the cache's size.
Letters: N queries, B cache rows, S slots, H heads, R latent, r rotary, C = R + r, K selected, P chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5.kernels.cuda.launch import ACTIVATIONS, ceil_div, need, next_power, on_its_device, product_type
from glm5.kernels.cuda.programs import mla as programs
from glm5.kernels.slots import Slots

HEADS = 16  # of a program: the fewest rows a tensor core takes
# Slots of a program: short chunks where DSA chose 2048 slots, so that one query keeps a GPU busy.
CHUNK_OF_SELECTED, CHUNK_OF_ALL = 64, 128
# Chunks' sums held at a time, in floats (256 MiB): more queries go one part after another.
MOST_SUMS = 1 << 26
LOG2_E = 1.4426950408889634  # the kernels take powers of two


@on_its_device
def attend(
    q_NHC: Tensor, cache_BSC: Tensor, rows: Tensor, chosen: Slots, *, latent: int, scale: float,
    visible_NS: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """sum_s softmax_s(scale q . cache[s]) cache[s, :latent], [N, H, latent] in the dtype of q.

    q: [N, H, C], W_UK folded in and rotated. cache: like q, [B, S, C], any strides of B and S.
    rows: int32 [N], the cache row of each query. chosen: slots int32 [N, K] (None: all in order), of
    which the first `counts` int32 [N] are read. visible: bool [N, S], with slots None. A query that
    sees nothing gets zeros.

    Raises ValueError when sizes contradict each other.
    """
    count, heads, width = q_NHC.shape
    slots = chosen.slots
    need(q_NHC.dtype in ACTIVATIONS and cache_BSC.dtype == q_NHC.dtype, "query and cache differ in dtype")
    need(cache_BSC.shape[2] == width and 0 < latent < width, "query and cache differ in width")
    need(cache_BSC.stride(2) == 1, "cache rows are not contiguous")
    need(tuple(rows.shape) == tuple(chosen.counts.shape) == (count,), "rows and counts are not [N]")
    need(slots is None or (slots.shape[0] == count and slots.is_contiguous()), "slots are not [N, K]")
    need(visible_NS is None or slots is None, "slots are visible already")
    reach = cache_BSC.shape[1] if slots is None else slots.shape[1]
    if visible_NS is not None:
        fits = tuple(visible_NS.shape) == (count, reach) and visible_NS.dtype == torch.bool
        need(fits, "visible is not bool [N, S]")
        visible_NS = visible_NS.contiguous()
    out = torch.empty(count, heads, latent, dtype=q_NHC.dtype, device=q_NHC.device)
    q_NHC, rows, counts = q_NHC.contiguous(), rows.contiguous(), chosen.counts.contiguous()
    chunk = CHUNK_OF_ALL if slots is None else CHUNK_OF_SELECTED
    each = max(1, MOST_SUMS // max(1, ceil_div(reach, chunk) * heads * latent))
    for first in range(0, count, each):
        some = slice(first, first + each)
        _attend(
            q_NHC[some], cache_BSC, rows[some], None if slots is None else slots[some], counts[some],
            None if visible_NS is None else visible_NS[some], reach, chunk, scale, out[some],
        )  # fmt: skip
    return out


def _attend(
    q_NHC: Tensor, cache_BSC: Tensor, rows: Tensor, slots: Tensor | None, counts: Tensor,
    visible_NS: Tensor | None, reach: int, chunk: int, scale: float, out_NHR: Tensor,
) -> None:  # fmt: skip
    count, heads, width = q_NHC.shape
    latent, chunks, narrow = out_NHR.shape[2], ceil_div(reach, chunk), q_NHC.element_size() == 2
    sums_NPHR = torch.empty(count, chunks, heads, latent, dtype=torch.float32, device=q_NHC.device)
    peaks_NPH = torch.empty(count, chunks, heads, dtype=torch.float32, device=q_NHC.device)
    masses_NPH = torch.empty_like(peaks_NPH)
    programs.attend_chunk[count, ceil_div(heads, HEADS), chunks](
        q_NHC, cache_BSC, rows, slots, visible_NS, counts, sums_NPHR, peaks_NPH, masses_NPH, heads, reach,
        cache_BSC.stride(0), cache_BSC.stride(1), scale * LOG2_E, latent=latent, rotary=width - latent,
        latent_block=max(16, next_power(latent)), rotary_block=max(16, next_power(width - latent)),
        head_block=HEADS, chunk=chunk, slot_block=32 if narrow else 16, product=product_type(q_NHC.dtype),
        num_warps=4 if narrow else 8, num_stages=2 if narrow else 1,
    )  # fmt: skip
    programs.join_chunks[count, heads](
        sums_NPHR, peaks_NPH, masses_NPH, out_NHR, heads, chunks, latent=latent, block=next_power(latent)
    )
