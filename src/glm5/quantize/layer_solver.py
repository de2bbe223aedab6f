"""One decoder layer of the calibrated method: a matrix in memory at a time, in the order in which they run.

The modules are the model's own, built on the meta device and filled as they are needed. To see the inputs
of a linear layer, a `_Watch` takes its place and ends the pass there.
Letters: N calibration tokens, D hidden, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from glm5.errors import CheckpointError
from glm5.model.indexer import Selection
from glm5.model.layer import DecoderLayer
from glm5.model.moe import MLP, MixtureOfExperts
from glm5.quantize.gptq import Factor, Hessian, output_errors, solve, unpacked
from glm5.quantize.hidden import Hidden, step_of
from glm5.quantize.plan import Item
from glm5.quantize.results import Result, Results, nearest
from glm5.quantize.sources import WeightSource

# Linear layers that read the same input, in the order in which they run.
ATTENTION = (
    ("q_a_proj", "q_proj", "k_proj", "v_proj", "kv_a_proj_with_mqa", "indexer.wk", "indexer.weights_proj"),
    ("q_b_proj", "indexer.wq_b"),
    ("kv_b_proj",),
    ("o_proj",),
)
GATE_UP, DOWN = ("gate_proj", "up_proj"), ("down_proj",)
# Average tokens of the layer that are counted among an expert's own, as a multiple of the input's width:
# of fewer inputs than that no Hessian is known (measured: docs/quantize.md).
PRIOR = 1.0
# So many stand for all tokens where only the expert itself can say what it makes of one.
SAMPLED_TOKENS = 256
CHUNK = 1024


Passes = Callable[[], Iterator[Callable[[], object]]]  # runs of a module, a window of tokens each
HessianOf = Callable[[str, int], Hessian]  # (first of the layers that share the input, its width)


class LayerSolver:
    """Fills a decoder layer that lies on the meta device, rounding what the recipe rounds.

    owner: the layer, or the MTP layer that it is a part of. prefix: of the weights' names on disk. What is
    solved goes to `results`, and is not solved again. tell: called with each weight that has its codes.
    """

    def __init__(
        self,
        layer: DecoderLayer,
        owner: nn.Module,
        prefix: str,
        source: WeightSource,
        items: dict[str, Item],
        results: Results,
        dampening_frac: float,
        tell: Callable[[Item], None],
    ) -> None:
        self._layer, self._prefix = layer, prefix
        self._source, self._items, self._results = source, items, results
        self._dampening_frac, self._tell = dampening_frac, tell
        schemes = [item.scheme for item in items.values() if item.scheme is not None]
        self._group = schemes[0].group if schemes else 32
        for name, item in items.items():
            if name.startswith(prefix) and not item.is_expert and (item.scheme is None or "eh_proj" in name):
                own = name.removeprefix(prefix)
                _fill(layer if hasattr(layer, own.split(".")[0]) else owner, own, source.read(name).float())

    def run(self, hidden: Hidden) -> None:
        """Round the layer and move `hidden` on through it."""
        self._attention(hidden)
        self._layer.self_attn = nn.Identity()  # type: ignore[assignment]  # leaves its memory to the experts
        mlp, path = self._layer.mlp, f"{self._prefix}mlp"
        if isinstance(mlp, MixtureOfExperts):
            hidden.x_ND += self._mixture(mlp, path, hidden.x_ND)
        else:
            watched = self._watched(mlp, lambda: self._feeds(mlp, hidden.x_ND))
            self._solve(mlp, path, GATE_UP, watched)
            self._solve(mlp, path, DOWN, watched)
            for x_ND in hidden.x_ND.split(CHUNK):
                x_ND += mlp(self._layer.post_attention_layernorm(x_ND))
        if not all(bool(torch.isfinite(x_ND).all()) for x_ND in hidden.x_ND.split(CHUNK)):
            raise CheckpointError(
                f"{self._source.path}: {self._prefix.removesuffix('.')} makes values of the calibration text "
                "that are not finite; the checkpoint is damaged"
            )

    # ---------------------------------------------------------------- the halves of a layer

    def _attention(self, hidden: Hidden) -> None:
        attention: Any = self._layer.self_attn
        config = self._source.config

        def attend(number: int, window: slice) -> tuple[Tensor, Selection | None]:
            step = step_of(window.stop - window.start, config)
            x_BTD = self._layer.input_layernorm(hidden.x_ND[window]).unsqueeze(0)
            found: tuple[Tensor, Selection | None] = attention(x_BTD, step, hidden.selections.get(number))
            return found

        def passes() -> Iterator[Callable[[], object]]:
            for number, window in hidden.windows():
                yield partial(attend, number, window)

        for members in ATTENTION:
            self._solve(attention, f"{self._prefix}self_attn", members, self._watched(attention, passes))
        for number, window in hidden.windows():
            out_BTD, selection = attend(number, window)
            hidden.x_ND[window] += out_BTD[0]
            hidden.selections.pop(number, None)
            if selection is not None:
                hidden.selections[number] = selection

    def _mixture(self, mixture: MixtureOfExperts, path: str, x_ND: Tensor) -> Tensor:
        """The experts' and the shared expert's sum [N, D], each rounded before it is run."""
        norm, tokens = self._layer.post_attention_layernorm, torch.arange(len(x_ND))
        routed = [mixture.gate(norm(x)) for x in x_ND.split(CHUNK)]
        ids_NK = torch.cat([routing.topk_ids_TK for routing in routed])
        weights_NK = torch.cat([routing.topk_weights_TK for routing in routed])
        out_ND = torch.zeros_like(x_ND)

        @cache
        def everyone() -> Hessian:
            hessian = Hessian(x_ND.shape[1], self._group)
            for x in x_ND.split(CHUNK):
                hessian.add(norm(x))
            return hessian

        for expert in range(mixture.gate.weight.shape[0]):
            token, place = (ids_NK == expert).nonzero(as_tuple=True)
            self._expert(f"{path}.experts.{expert}", x_ND, token, weights_NK[token, place], everyone, out_ND)
        shared = mixture.shared_experts
        if shared is not None:
            watched = self._watched(shared, lambda: self._feeds(shared, x_ND))
            self._solve(shared, f"{path}.shared_experts", GATE_UP, lambda *_: everyone())
            self._solve(shared, f"{path}.shared_experts", DOWN, watched)
            for rows in tokens.split(CHUNK):
                out_ND[rows] += shared(norm(x_ND[rows]))
        return out_ND

    def _expert(
        self, path: str, x_ND: Tensor, token: Tensor, weights: Tensor, everyone: Callable[[], Hessian],
        out_ND: Tensor,
    ) -> None:  # fmt: skip
        """Round an expert on the tokens that reach it, and add what it makes of them to `out_ND`."""
        if not len(token):
            for name in (*GATE_UP, *DOWN):
                self._nearest(f"{path}.{name}.weight")
            return
        norm = self._layer.post_attention_layernorm
        with torch.device("meta"):
            mlp = MLP(x_ND.shape[1], self._source.config.moe_intermediate_size)
        sample = torch.linspace(0, len(x_ND) - 1, min(len(x_ND), SAMPLED_TOKENS)).round().long()
        own = self._watched(mlp, lambda: self._feeds(mlp, x_ND, token))
        others = self._watched(mlp, lambda: self._feeds(mlp, x_ND, sample))

        def of_input(first: str, columns: int) -> Hessian:
            hessian = own(first, columns)
            hessian.blend(everyone(), PRIOR * columns)
            return hessian

        def of_middle(first: str, columns: int) -> Hessian:
            hessian = own(first, columns)
            hessian.blend(others(first, columns), PRIOR * columns)
            return hessian

        self._solve(mlp, path, GATE_UP, of_input)
        self._solve(mlp, path, DOWN, of_middle)
        for rows, part in zip(token.split(CHUNK), weights.split(CHUNK), strict=True):
            out_ND.index_add_(0, rows, mlp(norm(x_ND[rows])) * part.unsqueeze(1))

    def _feeds(self, mlp: MLP, x_ND: Tensor, token: Tensor | None = None) -> Iterator[Callable[[], object]]:
        """Runs over the tokens of these numbers; None = all."""
        norm = self._layer.post_attention_layernorm
        token = torch.arange(len(x_ND)) if token is None else token
        for rows in token.split(CHUNK):
            yield partial(mlp, norm(x_ND[rows]))

    # ---------------------------------------------------------------- linear layers

    def _watched(self, owner: nn.Module, passes: Passes) -> HessianOf:
        """How to count the inputs of one of the owner's layers, all that runs before it being in place."""

        def hessian_of(first: str, columns: int) -> Hessian:
            hessian = Hessian(columns, self._group)
            parent, name = owner.get_submodule(first.rpartition(".")[0]), first.rpartition(".")[2]
            watch, layer = _Watch(hessian), getattr(parent, name)
            setattr(parent, name, watch)
            for run in passes():
                with suppress(_Seen):
                    run()
            setattr(parent, name, layer)
            return hessian

        return hessian_of

    def _solve(self, owner: nn.Module, path: str, members: tuple[str, ...], hessian_of: HessianOf) -> None:
        """Round the layers of `owner` that read one input, and put into place what they have become."""
        found = [name for name in members if f"{path}.{name}.weight" in self._items]
        items = {name: self._items[f"{path}.{name}.weight"] for name in found}
        todo = [item for item in items.values() if item.scheme and item.name not in self._results]
        if todo:
            hessian = hessian_of(found[0], todo[0].shape[1])
            factor = Factor.of(hessian, self._dampening_frac)
            for item in todo:
                self._solve_one(item, hessian, factor)
            del hessian, factor
        for name, item in items.items():
            if item.scheme is not None:
                result = self._results.load(item.name)
                values = unpacked(result.words, result.scales, item.scheme.bits, item.shape[1])
                _fill(owner, f"{name}.weight", values)
                self._tell(item)
            elif item.is_expert:
                _fill(owner, f"{name}.weight", self._source.read(item.name).float())

    def _solve_one(self, item: Item, hessian: Hessian, factor: Factor) -> None:
        assert item.scheme is not None
        values = self._source.read(item.name)
        solved = solve(values, factor, item.scheme)
        if math.isnan(solved.energy):
            raise CheckpointError(
                f"{self._source.path}: {item.name} holds an infinite weight or NaN and cannot be quantized"
            )
        before, after = output_errors(values, hessian, solved, item.scheme)
        figures = {
            "relative_error": solved.relative_error, "output_error": after, "output_error_nearest": before,
        }  # fmt: skip
        self._results.save(item.name, Result(solved.words, solved.scales, figures))

    def _nearest(self, name: str) -> None:
        item = self._items[name]
        if item.scheme is None:
            return
        if name not in self._results:
            self._results.save(name, nearest(self._source, item))
        self._tell(item)


class _Seen(Exception):  # noqa: N818  # no error: the pass has come as far as it was wanted
    pass


class _Watch(nn.Module):
    """Stands where a linear layer was: counts its inputs and ends the pass."""

    def __init__(self, hessian: Hessian) -> None:
        super().__init__()
        self.hessian = hessian

    def forward(self, x: Tensor) -> Tensor:
        self.hessian.add(x)
        raise _Seen


def _fill(owner: nn.Module, name: str, values: Tensor) -> None:
    """Give a parameter or buffer on the meta device its values."""
    path, _, attribute = name.rpartition(".")
    module = owner.get_submodule(path)
    if attribute in dict(module.named_buffers(recurse=False)):
        setattr(module, attribute, values)
    else:
        setattr(module, attribute, nn.Parameter(values, requires_grad=False))
