"""Feed-forward layers in one call: a bank of experts, with or without its router and a shared expert.

The bank is a table of slots: an expert may be put, replaced and dropped between calls. What a layer
computes does not depend on how tokens are grouped into calls, nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glm5.kernels.cpu.matrix import Matrix, Vector
from glm5.kernels.cpu.native import activations, fill, floats, here, inside, library, need, whole

Feed = tuple[Matrix, Matrix, Matrix]  # gate, up, down


class ExpertBank:
    """E places for experts of one kind: `put`, `drop`; a call that needs an absent one is refused."""

    def __init__(self, hidden: int, num_experts: int) -> None:
        self.hidden, self.num_experts = hidden, num_experts
        self.handle = library.ExpertBank(hidden, num_experts)
        self._kept: list[Feed | None] = [None] * num_experts
        self._kind: list[tuple[object, ...]] | None = None

    @classmethod
    def of(cls, hidden: int, experts: Sequence[Feed]) -> ExpertBank:
        """A bank with every expert in its place."""
        bank = cls(hidden, len(experts))
        for number, expert in enumerate(experts):
            bank.put(number, expert)
        return bank

    def put(self, number: int, expert: Feed) -> None:
        """Expert `number` is (gate, up, down) from now on; the matrices stay alive with the bank."""
        need(0 <= number < self.num_experts, f"the bank has no place {number}")
        check_feed(*expert, self.hidden)
        kind = [_kind(matrix) for matrix in expert]
        need(self._kind in (None, kind), "the experts of a layer must be of one kind")
        self._kind, self._kept[number] = kind, expert
        self.handle.put(number, *(matrix.handle for matrix in expert))

    def drop(self, number: int) -> None:
        """Expert `number` is not in memory any more."""
        need(0 <= number < self.num_experts, f"the bank has no place {number}")
        self._kept[number] = None
        self.handle.drop(number)


class MoeLayer:
    """A feed-forward layer: router, routed experts, shared expert; or a dense network (shared only)."""

    def __init__(self, hidden: int, bank: ExpertBank | None = None, shared: Feed | None = None) -> None:
        self.hidden, self.bank = hidden, bank
        self.num_experts, self.topk = 0 if bank is None else bank.num_experts, 0
        self.handle = library.MoeLayer(hidden)
        self._kept: list[object] = [shared]
        if bank is not None:
            need(bank.hidden == hidden, "the bank is of another width")
            self.handle.set_bank(bank.handle)
        if shared is not None:
            check_feed(*shared, hidden)
            self.handle.set_shared(*(matrix.handle for matrix in shared))

    def set_router(
        self, weight: Matrix, bias: Tensor, *, topk: int, groups: int = 1, topk_groups: int = 1,
        normalize: bool = True, factor: float = 1.0,
    ) -> None:  # fmt: skip
        """weight [E, hidden], bias [E]; both are read where they lie, so a change of them is seen."""
        if self.bank is None:  # a router by itself
            self.num_experts = weight.rows
        experts = self.num_experts
        need((weight.rows, weight.columns) == (experts, self.hidden), "the router has other sizes")
        need(bias.shape == (experts,) and 0 < topk <= experts, "router bias or topk is wrong")
        need(groups > 0 and experts % groups == 0 and 0 < topk_groups <= groups, "router groups are wrong")
        need(topk <= experts // groups * topk_groups, "the groups hold fewer experts than topk")
        vector = Vector(bias)
        self._kept += [weight, vector]
        self.topk = topk
        self.handle.set_router(weight.handle, vector.handle, topk, groups, topk_groups, normalize, factor)

    def route(self, x: Tensor) -> Told:
        """What the router chooses for each row of x [..., hidden], fp32 or bf16."""
        x = activations(x, self.hidden)
        need(self.topk > 0, "the layer has no router")
        told = Told(x.numel() // self.hidden, self.topk, self.num_experts)
        call = fill(
            library.MoeCall(), x=x, x_bf16=x.dtype == torch.bfloat16, count=len(told.ids),
            chosen_ids=told.ids, chosen_weights=told.weights, scores=told.scores,
        )  # fmt: skip
        library.route(call, self.handle)
        return told

    def __call__(
        self,
        x: Tensor,
        *,
        routing: tuple[Tensor, Tensor] | None = None,
        add: Tensor | None = None,
        norm: Tensor | None = None,
        eps: float = 0.0,
        exact: bool = False,
        told: Told | None = None,
    ) -> Tensor:
        """add + experts(norm(x)) + shared(norm(x)), like x [..., hidden].

        routing: (ids [T, K], weights [T, K]) in place of the layer's own router.
        told: filled with what the router chose.
        """
        x = activations(x, self.hidden)
        tokens = x.numel() // self.hidden
        out = torch.empty_like(x)
        if add is not None:
            like = add.shape == x.shape and add.dtype == x.dtype and add.is_contiguous()
            need(like and add.device.type == "cpu", "add must be like x")
        ids = weights = None
        if routing is not None:
            need(not routing[0].is_floating_point(), "routed experts are no integers")
            inside(here(routing[0], "routed experts"), 0, self.num_experts, "routed experts")
            ids, weights = routing[0].to(torch.int32).contiguous(), routing[1].float().contiguous()
            need(
                ids.shape == weights.shape and ids.dim() == 2 and len(ids) == tokens, "routing is not [T, K]"
            )
            need(
                ids.shape[1] > 0 and told is None,
                "no expert is routed to, or the router is asked all the same",
            )
        else:
            need(self.bank is None or self.topk > 0, "the layer has no router")
        call = fill(
            library.MoeCall(), x=x, out=out, add=add, x_bf16=x.dtype == torch.bfloat16, count=tokens,
            norm=floats(norm, self.hidden, "norm"), eps=eps, exact=exact, ids=ids, weights=weights,
            topk=0 if ids is None else ids.shape[1],
        )  # fmt: skip
        if told is not None:
            told.check(tokens, self.topk, self.num_experts)
            fill(call, chosen_ids=told.ids, chosen_weights=told.weights, scores=told.scores)
        library.moe(call, self.handle)
        return out


class Told:
    """What a router chose, written by the call: ids int32 [T, K], weights [T, K], scores [T, E] in fp32."""

    def __init__(self, tokens: int, topk: int, experts: int) -> None:
        self.ids = torch.empty(tokens, topk, dtype=torch.int32)
        self.weights = torch.empty(tokens, topk)
        self.scores = torch.empty(tokens, experts)

    def check(self, tokens: int, topk: int, experts: int) -> None:
        whole(self.ids, (tokens, topk), torch.int32, "ids")
        whole(self.weights, (tokens, topk), torch.float32, "weights")
        whole(self.scores, (tokens, experts), torch.float32, "scores")


def check_feed(gate: Matrix, up: Matrix, down: Matrix, hidden: int) -> None:
    sizes = [(m.rows, m.columns) for m in (gate, up, down)]
    width = gate.rows
    need(sizes == [(width, hidden), (width, hidden), (hidden, width)], f"gate, up, down are {sizes}")


def _kind(matrix: Matrix) -> tuple[object, ...]:
    return matrix.rows, matrix.columns, matrix.bits, matrix.group, matrix.weight.dtype
