"""From a checkpoint to a model that runs: built without memory, its parts swapped, then filled."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from glm5.checkpoint.directory import Checkpoint
from glm5.checkpoint.filling import Progress, SchemeOf, fill, plan_reads, stored_scheme
from glm5.config import ModelConfig
from glm5.errors import CheckpointError
from glm5.formats.packed import Packed, Scheme
from glm5.kernels import cpu
from glm5.layers.swap import materialize, swap
from glm5.model.transformer import GlmForCausalLM

M = TypeVar("M", bound=GlmForCausalLM)


@torch.inference_mode(False)  # other threads, which do not inherit the mode, could not fill its tensors
def load_model(
    source: Path | Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    config: ModelConfig | None = None,
    progress: Progress | None = None,
    quantize: SchemeOf | None = None,
    build: Callable[[ModelConfig], M] = GlmForCausalLM,  # type: ignore[assignment]
) -> M:
    """The model of a checkpoint, in eval mode.

    dtype: of the float weights in memory; None = as stored (FP8 becomes bf16). Router biases stay fp32.
    config: in place of the directory's `config.json`.
    progress: called with (bytes read, bytes in all).
    quantize: a scheme for each module (by its name on disk) that is to be rounded while it is read;
        None = as stored. Packed int4 and int8 stay packed, other forms become floats of `dtype`.
    build: makes the model from its config: GlmForCausalLM or a subclass that adds no tensors.

    Raises:
        CheckpointError: a tensor is missing, unknown, of a wrong shape or dtype, or damaged.
        ConfigError: `config.json` cannot be used.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source, config)
    device = torch.device(device)
    with torch.device("meta"):
        model = build(checkpoint.config)
    targets = swap(model, device, quantize or stored_scheme(checkpoint))
    sources = plan_reads(checkpoint, targets)
    materialize(model, dtype or checkpoint.float_dtype, device)
    fill(checkpoint, sources, rounder=None if quantize is None else round_packed, progress=progress)
    return model.eval()


def round_packed(values: Tensor, scheme: Scheme, name: str, where: Path) -> Packed:
    """Float values [out, in] in the scheme's codes."""
    rounded = round_finite(values, scheme, name, where)
    return Packed(rounded.words, rounded.scales)


def round_finite(values: Tensor, scheme: Scheme, name: str, where: Path) -> cpu.Rounded:
    """`cpu.round_weights`, or a CheckpointError that names the weight when it is not finite."""
    rounded = cpu.round_weights(values, bits=scheme.bits, group=scheme.group)
    if not math.isfinite(rounded.energy):
        raise CheckpointError(f"{where}: {name} holds an infinite weight or NaN and cannot be quantized")
    return rounded
