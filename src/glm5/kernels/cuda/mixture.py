"""A bank of packed experts: sum_k weight_k * down(silu(gate x) * up x).

Two products (gate and up with SiLU; down), then a sum over a token's experts in the order of its
top-k: every (token, k) has a row of its own, so nothing is added by atomics.
Few tokens: a program reads a band of one expert's rows for one (token, k). Many: assignments are
sorted by expert on the device and met in tiles; how many tiles there are is never asked for.
Letters: E experts, D hidden, I expert width, T tokens, K experts a token, A = T K assignments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from glm5.kernels.cuda.bank import Bank
from glm5.kernels.cuda.launch import ACTIVATIONS, ceil_div, need, on_its_device, product_type
from glm5.kernels.cuda.programs import mixture as programs
from glm5.kernels.cuda.tiles import BAND_ROWS, BAND_WARPS, FEW_ROWS, bands_of, expert_tile, units_of


@on_its_device
def experts(x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, bank: Bank) -> Tensor:
    """The weighted sum over each token's experts, [T, D] in the dtype of x.

    x: bf16, fp16 or fp32 [T, D]. ids: integers [T, K], each below E (not checked: that would wait for
    the GPU). weights: floats [T, K]. The activation between the products is rounded to the dtype of x.

    Raises ValueError when sizes contradict each other.
    """
    tokens, topk = topk_ids_TK.shape
    need(x_TD.dtype in ACTIVATIONS, f"activations are {x_TD.dtype}, not a float of 16 or 32 bits")
    need(tuple(x_TD.shape) == (tokens, bank.hidden), f"activations are not [{tokens}, {bank.hidden}]")
    need(topk_weights_TK.shape == topk_ids_TK.shape, "ids and weights are not both [T, K]")
    need(
        bank.run.dim() == 2 and bank.run.shape[1] % 16 == 0 and bank.run.is_contiguous(),
        "runs are not [E, stride]",
    )
    if tokens == 0:
        return torch.empty_like(x_TD)
    x_TD = x_TD.contiguous()
    ids_A = topk_ids_TK.reshape(-1).to(torch.int32).contiguous()
    weights_A = topk_weights_TK.reshape(-1).float().contiguous()
    act_AI = torch.empty(tokens * topk, bank.width, dtype=x_TD.dtype, device=x_TD.device)
    out_AD = torch.empty(tokens * topk, bank.hidden, dtype=torch.float32, device=x_TD.device)
    run = _few_tokens if tokens <= FEW_ROWS else _many_tokens
    run(x_TD, ids_A, weights_A, bank, act_AI, out_AD)
    out_TD = torch.empty_like(x_TD)
    block = 512
    grid = (tokens, ceil_div(bank.hidden, block))
    programs.add_topk[grid](out_AD, out_TD, bank.hidden, topk=topk, block=block)
    return out_TD


def _few_tokens(
    x_TD: Tensor, ids_A: Tensor, weights_A: Tensor, bank: Bank, act_AI: Tensor, out_AD: Tensor
) -> None:
    topk = len(ids_A) // len(x_TD)
    for rows, columns, projections in ((bank.width, bank.hidden, (0, 1)), (bank.hidden, bank.width, (2,))):
        units = units_of(columns, bank.bits, bank.group)
        bands = bands_of(rows, units)
        weights = (bank.words, bank.scales, *(at for p in projections for at in bank.at(p)))
        sizes = (rows, units.across, units.row_words, units.groups, bands.tiles, *bank.strides)
        how = {**units.constants(), "tile_units": bands.tile_units, "band_rows": BAND_ROWS}
        grid = (len(ids_A), ceil_div(rows, BAND_ROWS))
        if len(projections) == 2:
            programs.few_gate_up[grid](
                x_TD, *weights, ids_A, act_AI, *sizes, topk=topk, num_warps=BAND_WARPS, **how
            )
        else:
            programs.few_down[grid](
                act_AI, *weights, ids_A, weights_A, out_AD, *sizes, num_warps=BAND_WARPS, **how
            )


class Sorted(NamedTuple):
    """Assignments by expert, and the tiles that cover them. Unused tiles have rows = 0."""

    assignment_A: Tensor  # int32: which (token, k) stands at each sorted place
    expert_N: Tensor  # int32 [N]: the expert of each tile
    first_N: Tensor  # int32 [N]: its first sorted place
    rows_N: Tensor  # int32 [N]: how many it has


def sort_by_expert(ids_A: Tensor, num_experts: int, tile_rows: int) -> Sorted:
    """Only device work: the number of tiles is the most that could be needed."""
    device, count = ids_A.device, len(ids_A)
    sorted_A, order_A = torch.sort(ids_A, stable=True)
    every = torch.arange(num_experts + 1, dtype=torch.int32, device=device)
    starts = torch.searchsorted(sorted_A, every)
    loads_E = starts[1:] - starts[:-1]
    ends_E = ((loads_E + (tile_rows - 1)) // tile_rows).cumsum(0)  # tiles up to and with each expert
    tile_N = torch.arange(min(num_experts, count) + count // tile_rows, device=device)
    expert_N = torch.searchsorted(ends_E, tile_N, right=True)
    used_N = expert_N < num_experts
    expert_N = expert_N.clamp(max=num_experts - 1)
    tiles_E = torch.cat((ends_E.new_zeros(1), ends_E))
    within_N = (tile_N - tiles_E[expert_N]) * tile_rows
    rows_N = torch.where(used_N, (loads_E[expert_N] - within_N).clamp(max=tile_rows), 0)
    first_N = starts[expert_N] + within_N
    return Sorted(*(t.to(torch.int32) for t in (order_A, expert_N, first_N, rows_N)))


def _many_tokens(
    x_TD: Tensor, ids_A: Tensor, weights_A: Tensor, bank: Bank, act_AI: Tensor, out_AD: Tensor
) -> None:
    topk = len(ids_A) // len(x_TD)
    tile = expert_tile(len(x_TD), len(bank.run), topk, x_TD.element_size())
    by_expert = sort_by_expert(ids_A, len(bank.run), tile.tokens)
    for rows, columns, projections in ((bank.width, bank.hidden, (0, 1)), (bank.hidden, bank.width, (2,))):
        units = units_of(columns, bank.bits, bank.group)
        weights = (bank.words, bank.scales, *(at for p in projections for at in bank.at(p)))
        sizes = (rows, units.across, units.row_words, units.groups, *bank.strides)
        how = {**units.constants(), **tile.constants(), "product": product_type(x_TD.dtype)}
        grid = (len(by_expert.expert_N), ceil_div(rows, tile.rows))
        if len(projections) == 2:
            programs.many_gate_up[grid](x_TD, *weights, *by_expert, act_AI, *sizes, topk=topk, **how)
        else:
            programs.many_down[grid](act_AI, *weights, *by_expert, weights_A, out_AD, *sizes, **how)
