"""The calibrated method's walk: the calibration tokens go from layer to layer.

Each layer is rounded on what reaches it through the layers rounded before. The walk goes on only as far
as codes are asked for, and every step lies on disk, so a job that is killed goes on at the matrix where
it stood. One layer is `layer_solver`'s, the maths `gptq`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from glm5.disk.files import remove_temporaries
from glm5.model.layer import DecoderLayer
from glm5.model.mtp import MTPLayer
from glm5.model.norms import RMSNorm
from glm5.quantize.calibration import Calibration
from glm5.quantize.hidden import Hidden, embedded
from glm5.quantize.layer_solver import LayerSolver
from glm5.quantize.plan import Item
from glm5.quantize.results import Result, Results
from glm5.quantize.sources import WeightSource


class CalibratedRounding:
    """Codes of every weight in a layer, from a walk that goes on as they are asked for.

    folder: where the walk keeps its state. Weights that a finished shard holds may be forgotten there.
    advance: told the bytes of each weight as it is dealt with.
    """

    def __init__(
        self, source: WeightSource, items: list[Item], calibration: Calibration, folder: Path,
        advance: Callable[[int], None],
    ) -> None:  # fmt: skip
        self._advance, self._told = advance, set[str]()
        self._source, self._calibration, self._folder = source, calibration, folder
        self._items = {item.name: item for item in items}
        depth = source.config.num_hidden_layers + source.config.num_nextn_predict_layers
        self._prefixes = [f"model.layers.{number}." for number in range(depth)]
        self._results = Results(folder)
        self._hidden: Hidden | None = None
        self._done = self._take_up()  # layers

    def __call__(self, item: Item) -> Result | None:
        """What the walk found for a weight; None = it is in no layer, or joins the input of an MTP layer.

        Raises CheckpointError: a weight of its layer, or what it makes of the text, is not finite.
        """
        layer = next((n for n, prefix in enumerate(self._prefixes) if item.name.startswith(prefix)), None)
        if layer is None or item.name.endswith(".eh_proj.weight"):
            return None
        while self._done <= layer:
            self._walk_layer()
        self._tell(item)  # of layers that an earlier run walked
        return self._results.load(item.name)

    def forget(self, items: Iterable[Item]) -> None:
        """Drop the files of weights that a finished shard holds."""
        self._results.forget(item.name for item in items if item.scheme is not None)

    def _tell(self, item: Item) -> None:
        if item.name not in self._told:
            self._told.add(item.name)
            self._advance(item.read_bytes)

    def _take_up(self) -> int:
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(self._folder)
        found = sorted(self._folder.glob("hidden-*.safetensors"))
        for path in found[:-1]:
            path.unlink()
        return int(found[-1].stem.removeprefix("hidden-")) if found else 0

    @torch.no_grad()
    def _walk_layer(self) -> None:
        number, config = self._done, self._source.config
        if self._hidden is None:
            self._hidden = self._read_hidden(number)
        draft = number - config.num_hidden_layers
        with torch.device("meta"):
            owner = DecoderLayer.of(config, number) if draft < 0 else MTPLayer(config, number)
        layer = owner.layer if isinstance(owner, MTPLayer) else owner
        solver = LayerSolver(
            layer, owner, self._prefixes[number], self._source, self._items, self._results,
            self._calibration.dampening_frac, self._tell,
        )  # fmt: skip
        if isinstance(owner, MTPLayer):
            self._enter_draft(self._hidden, owner, draft)
        solver.run(self._hidden)
        self._hidden.save(self._hidden_path(number + 1))
        self._hidden_path(number).unlink(missing_ok=True)
        self._done += 1

    def _read_hidden(self, layer: int) -> Hidden:
        if layer:
            return Hidden.load(self._hidden_path(layer), self._source.config)
        windows = self._calibration.input_ids
        ids = torch.tensor([token for window in windows for token in window])
        return Hidden(self._embedded(ids), [len(window) for window in windows])

    def _enter_draft(self, hidden: Hidden, layer: MTPLayer, draft: int) -> None:
        """An MTP layer reads the projection of what came before and of the next token's embedding."""
        config = self._source.config
        before = (
            "model.norm"
            if draft == 0
            else f"{self._prefixes[config.num_hidden_layers + draft - 1]}shared_head.norm"
        )
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        norm.weight = nn.Parameter(self._source.read(f"{before}.weight").float())
        following: list[int] = []
        for window in self._calibration.input_ids:
            # Past its end a window repeats its last token: one input of hundreds.
            ahead = window[1 + draft :]
            following += [*ahead, *window[-1:] * (len(window) - len(ahead))]
        next_ND = self._embedded(torch.tensor(following))
        hidden.selections.clear()
        for _, rows in hidden.windows():
            joined = torch.cat((layer.enorm(next_ND[rows]), layer.hnorm(norm(hidden.x_ND[rows]))), dim=-1)
            hidden.x_ND[rows] = layer.eh_proj(joined)

    def _embedded(self, ids: Tensor) -> Tensor:
        return embedded(self._source, ids, self._items["model.embed_tokens.weight"].scheme)

    def _hidden_path(self, layer: int) -> Path:
        return self._folder / f"hidden-{layer:05d}.safetensors"
