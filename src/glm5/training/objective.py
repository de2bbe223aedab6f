"""The losses of a training step and their gradients, however the step is cut into micro-batches.

Every loss is a sum over the step's tokens divided by the whole step's count of them, so that the cut changes
nothing (but the draw of expert dropout, where that is on). Places that are no tokens (padding) count nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glm5.model.attention import MultiHeadLatentAttention
from glm5.model.masks import TokenPositions, Visibility
from glm5.model.rotary import Rotation
from glm5.model.routing import Routing
from glm5.model.step import Probe, Step
from glm5.model.transformer import GlmForCausalLM
from glm5.training import losses
from glm5.training.batches import Batch
from glm5.training.recipe import LossSection


class _Watch(Probe):
    """Keeps what the losses need of a pass: routings, and attention's inputs where an indexer learns."""

    def __init__(self, wants_inputs: bool) -> None:
        self.wants_inputs = wants_inputs
        self.routings: dict[int, Routing] = {}
        self.inputs: dict[int, Tensor] = {}

    def routing(self, layer: int, routing: Routing) -> None:
        self.routings[layer] = routing

    def attention_input(self, layer: int, x_BTD: Tensor) -> None:
        if self.wants_inputs:
            self.inputs[layer] = x_BTD.detach()


@dataclass(frozen=True)
class Counts:
    """What a step's losses are divided by: targets of both heads, rows, tokens that teach an indexer."""

    lm: Tensor
    mtp: Tensor
    rows: int
    indexer: Tensor

    @classmethod
    def of(cls, batch: Batch, indexer_rows: int) -> Counts:
        def targets(ahead: int) -> Tensor:
            return (
                losses.shifted_targets(batch.ids, batch.documents, batch.learned, ahead) != losses.IGNORED
            ).sum()

        few = batch.documents[:indexer_rows] >= 0
        return cls(targets(1), targets(2), max(1, int((batch.documents >= 0).any(dim=1).sum())), few.sum())


@dataclass
class Gradients:
    """Losses of a step (language model, MTP, balance, indexer), and the tokens each expert got, by layer."""

    lm: Tensor
    mtp: Tensor
    balance: Tensor
    indexer: Tensor
    loads: dict[int, Tensor]

    def add(self, other: Gradients) -> None:
        self.lm, self.mtp = self.lm + other.lm, self.mtp + other.mtp
        self.balance, self.indexer = self.balance + other.balance, self.indexer + other.indexer
        for layer, load in other.loads.items():
            self.loads[layer] = self.loads[layer] + load if layer in self.loads else load

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(torch.stack([self.lm, self.mtp, self.balance, self.indexer])).all())


class Objective:
    """What a model is trained for: next token, the one after (MTP), balance, the indexers' choice."""

    def __init__(self, model: GlmForCausalLM, weights: LossSection, *, bf16: bool) -> None:
        self.model, self.weights, self.bf16 = model, weights, bf16

    def backward(self, batch: Batch, micro_rows: int, *, mtp: bool, indexer: bool) -> Gradients:
        """Add the gradients of a step's batch, `micro_rows` rows at a time; returns its losses and loads."""
        counts = Counts.of(batch, self.weights.indexer_rows)
        zero = torch.zeros(())
        total = Gradients(zero, zero, zero, zero, {})
        for first in range(0, len(batch.ids), micro_rows):
            few = max(0, self.weights.indexer_rows - first) if indexer else 0
            part = _rows_of(batch, slice(first, first + micro_rows))
            total.add(self._part(part, counts, mtp=mtp, indexer_rows=few))
        return total

    def _part(self, batch: Batch, counts: Counts, *, mtp: bool, indexer_rows: int) -> Gradients:
        model, weights = self.model, self.weights
        watch = _Watch(indexer_rows > 0)
        step = model.step(TokenPositions(batch.positions, None, batch.prefix, batch.documents), probe=watch)
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            hidden = model.model(batch.ids, step)
            targets = losses.shifted_targets(batch.ids, batch.documents, batch.learned, 1)
            lm = losses.linear_cross_entropy(hidden, model.lm_head.weight, targets, counts.lm)
            drafted = self._mtp(batch, hidden, step, counts) if mtp and model.mtp else torch.zeros(())
        routings, tokens = watch.routings, {layer: self._tokens(batch, layer) for layer in watch.routings}
        parts = [losses.balance_loss(routing, tokens[n], counts.rows) for n, routing in routings.items()]
        balance = torch.stack(parts).sum() if parts else torch.zeros(())
        indexer = torch.zeros(())
        if watch.inputs:
            indexer = self._indexer(watch.inputs, batch, step, indexer_rows, counts)
        total = lm + weights.mtp * drafted + weights.balance * balance + weights.indexer * indexer
        total.backward()
        loads = {layer: losses.expert_loads(routing, tokens[layer]) for layer, routing in routings.items()}
        mean_balance = balance.detach() / max(len(routings), 1)
        return Gradients(lm.detach(), drafted.detach(), mean_balance, indexer.detach(), loads)

    def _mtp(self, batch: Batch, hidden: Tensor, step: Step, counts: Counts) -> Tensor:
        """Cross entropy of token t+2 from the hidden state of t and the embedding of t+1."""
        following = self.model.model.embed_tokens(batch.ids.roll(-1, dims=1))
        drafted = self.model.mtp_layers()[0](hidden, following, step)
        targets = losses.shifted_targets(batch.ids, batch.documents, batch.learned, 2)
        return losses.linear_cross_entropy(drafted, self.model.lm_head.weight, targets, counts.mtp)

    def _indexer(
        self, inputs: dict[int, Tensor], batch: Batch, step: Step, rows: int, counts: Counts
    ) -> Tensor:
        """The mean over indexers, each against all the layers it serves, on a few rows."""
        few = slice(0, rows)
        rule = step.parts[0].visible
        mask = rule.as_mask(batch.ids.shape[1], batch.ids.device).expand(len(batch.ids), -1, -1)[few]
        angles, visible = Rotation(step.angles.turns[few]), Visibility(rule.num_keys, mask_BTS=mask)
        served: list[list[tuple[MultiHeadLatentAttention, Tensor]]] = []
        for attention in self._attentions():
            if attention.layer not in inputs:
                continue
            if attention.indexer is not None:
                served.append([])
            served[-1].append((attention, inputs[attention.layer][few].float()))
        parts = [
            losses.indexer_loss(
                group, angles, visible, self._tokens(batch, group[0][0].layer)[few], counts.indexer
            )
            for group in served
        ]
        return torch.stack(parts).mean()

    def _tokens(self, batch: Batch, layer: int) -> Tensor:
        """bool [B, T]: what are tokens to this layer. An MTP layer needs the next one of the document."""
        tokens = batch.documents >= 0
        if layer >= self.model.config.num_hidden_layers:
            following = batch.documents.roll(-1, dims=1)
            following[:, -1] = -1
            tokens = tokens & (following == batch.documents)
        return tokens

    def _attentions(self) -> Sequence[MultiHeadLatentAttention]:
        return [module for module in self.model.modules() if isinstance(module, MultiHeadLatentAttention)]


def _rows_of(batch: Batch, rows: slice) -> Batch:
    prefix = None if batch.prefix is None else batch.prefix[rows]
    return Batch(batch.ids[rows], batch.documents[rows], batch.positions[rows], batch.learned[rows], prefix)
