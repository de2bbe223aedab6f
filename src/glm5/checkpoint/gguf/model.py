"""A GLM model stored as GGUF, under the names and in the shapes of its Hugging Face checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from glm5.checkpoint import names
from glm5.checkpoint.directory import MAX_PARAMETERS
from glm5.checkpoint.gguf.config import model_config
from glm5.checkpoint.gguf.file import GgufFile, read_tensor, require_decoder
from glm5.checkpoint.gguf.header import GgufTensor
from glm5.checkpoint.gguf.names import Source, is_borrowed, source
from glm5.disk.safetensors_file import shown
from glm5.errors import CheckpointError
from glm5.model.transformer import GlmForCausalLM

# Fifty times GLM-5's experts, so that naming them one by one stays quick.
MAX_EXPERTS = 1 << 20


class GgufModel:
    """A GGUF file read as the Hugging Face checkpoint it was converted from.

    config: from the file's metadata.
    file: the GgufFile below.

    Everything is checked here: every tensor of the model is present, of the right shape and of a
    type that can be decoded, and no tensor is left over.

    Raises:
        CheckpointError: the architecture is not a GLM's, a key or tensor is missing, unknown or of
            a wrong shape or type; the message names it.
    """

    def __init__(self, path: str | os.PathLike[str] | GgufFile) -> None:
        self.file = path if isinstance(path, GgufFile) else GgufFile(path)
        self.config = model_config(self.file)
        self._sources: dict[str, Source] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in self._wanted():
            found = source(name, self.config, self.file.tensors)
            self._check(name, shape, found)
            self._sources[name], self._shapes[name] = found, shape
        self._check_leftovers()

    @property
    def names(self) -> list[str]:
        """Every tensor of the model in layer order, as `glm5.checkpoint.names.pieces` yields them."""
        return list(self._sources)

    def source(self, name: str) -> Source:
        """Where in the file a tensor lies."""
        try:
            return self._sources[name]
        except KeyError:
            raise CheckpointError(f"{self.file.path}: the model has no tensor {shown(name)}") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in the Hugging Face checkpoint, which is that of `read`."""
        self.source(name)
        return self._shapes[name]

    def num_bytes(self, name: str) -> int:
        """Bytes read from the file for a tensor; they add up to all that the model needs."""
        return sum(part.num_bytes for part in self._parts(self.source(name)))

    def read(self, name: str) -> Tensor:
        """A tensor's values, fp32 on the CPU; only its own bytes are read."""
        found = self.source(name)
        parts = [read_tensor(part) for part in self._parts(found)]
        if found.values is not None:
            keys, values = parts
            return torch.cat((keys.transpose(1, 2), values), dim=1).flatten(0, 1)
        if found.rows is not None and parts[0].dim() == 1:
            return parts[0][slice(*found.rows)].clone()
        return parts[0]

    def _parts(self, found: Source) -> list[GgufTensor]:
        part = self.file.tensor(found.tensor)
        if found.expert is not None:
            part = part.entry(found.expert)
        if found.rows is not None and len(part.shape) == 2:
            part = part.cut(*found.rows)
        return [part] if found.values is None else [part, self.file.tensor(found.values)]

    # --- checks -------------------------------------------------------------------------------

    def _wanted(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor that the configuration asks for."""
        config = self.config
        experts = config.n_routed_experts * (config.num_sparse_layers + config.num_nextn_predict_layers)
        if config.total_params(mtp=True) > MAX_PARAMETERS or experts > MAX_EXPERTS:
            raise CheckpointError(
                f"{self.file.path}: its keys describe a model beyond any that exists; do not use it"
            )
        with torch.device("meta"):
            model = GlmForCausalLM(config)
        tensors = names.state_tensors(model)
        for piece in names.pieces(model):
            yield piece.name, tuple(piece.of(tensors[piece.parameter]).shape)

    def _check(self, name: str, shape: tuple[int, ...], found: Source) -> None:
        config = self.config
        if found.values is not None:
            assert config.kv_lora_rank is not None
            heads, latent = config.num_attention_heads, config.kv_lora_rank
            self._check_stored(name, found.tensor, (heads, latent, config.qk_nope_head_dim))
            self._check_stored(name, found.values, (heads, config.v_head_dim, latent))
            return
        if found.rows is not None:
            fused = self.file.tensor(found.tensor).shape
            shape = (self._fused_rows(found), *shape[1:]) if fused else ()
        if found.expert is not None:
            shape = (config.n_routed_experts, *shape)
        self._check_stored(name, found.tensor, shape)

    def _fused_rows(self, found: Source) -> int:
        config = self.config
        if found.expert is not None:
            return 2 * config.moe_intermediate_size
        return (config.num_attention_heads + 2 * config.num_key_value_heads) * config.attention_head_dim

    def _check_stored(self, name: str, stored: str, shape: tuple[int, ...]) -> None:
        if stored not in self.file.tensors:
            raise CheckpointError(
                f"{self.file.path}: {shown(stored)} is missing, which holds {name}; download it again"
            )
        tensor = self.file.tensor(stored)
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.path}: {shown(stored)} has shape {list(tensor.shape)}, the file's keys ask for "
                f"{list(shape)}; download it again"
            )
        require_decoder(tensor)

    def _check_leftovers(self) -> None:
        used = {found.tensor for found in self._sources.values()}
        used |= {found.values for found in self._sources.values() if found.values is not None}
        extra = [
            name for name in self.file.tensors if name not in used and not is_borrowed(name, self.config)
        ]
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            raise CheckpointError(
                f"{self.file.tensor(extra[0]).path}: {shown(extra[0])}{more} has no place in the model that "
                "the file's keys describe; use another copy"
            )
