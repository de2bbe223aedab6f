"""What the quantize tests share: small sources on disk, the exact kernels, and what directories hold."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glm5.checkpoint import save_model
from glm5.config import ModelConfig
from glm5.kernels import cpu
from glm5.layers.loading import load_model
from glm5.layers.packed import PackedExperts, PackedLinear
from glm5.model.transformer import GlmForCausalLM
from glm5.quantize import Recipe
from tests.model_fixture import random_ids, tiny_config, tiny_model

RECIPE = Recipe(bits=4, group=32)
IDS = random_ids(2, 20)

# Widths that groups of 32 divide: 64, 96 and, for o_proj, 96.
_WIDTHS: dict[str, Any] = {"moe_intermediate_size": 64, "intermediate_size": 96, "latent_norm_eps": 1e-6}
_MLA = {"q_lora_rank": 64, "v_head_dim": 24}


def small_config(model_type: str = "glm4_moe_lite", **changes: Any) -> ModelConfig:
    """One dense layer, two of 8 experts, one MTP layer; every linear layer can be packed."""
    widths = _WIDTHS if model_type == "glm4_moe" else _WIDTHS | _MLA
    return tiny_config(model_type, **{**widths, **changes})


def smooth_config(model_type: str = "glm4_moe_lite", **changes: Any) -> ModelConfig:
    """Every expert runs for every token and every token is seen: no small error is made large by a choice."""
    return small_config(model_type, num_experts_per_tok=8, index_topk=4096, **changes)


def save_source(
    directory: Path, config: ModelConfig | None = None, *, stored: str = "bf16", seed: int = 0
) -> GlmForCausalLM:
    model = tiny_model(config or small_config(), seed)
    save_model(model, directory, stored=stored)
    return model


def as_floats(directory: Path, dtype: torch.dtype = torch.float32) -> GlmForCausalLM:
    """The model that a packed directory stands for, unpacked by the reader of compressed-tensors."""
    return load_model(directory, dtype=dtype, quantize=lambda module: None)


def all_weights(model: GlmForCausalLM) -> dict[str, Tensor]:
    """Those of a packed model too: codes and scales by the names of their modules."""
    found = dict(model.state_dict())
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear):
            found |= {f"{path}.words": module.words, f"{path}.scales": module.scales}
        elif isinstance(module, PackedExperts):
            found[f"{path}.bytes"] = module.bytes[:, : module.bytes_per_expert]
    return found


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def killed_at(number: int, destination: Path, job: Callable[[], object]) -> None:
    """The job, in a process that ends before its n-th change in `destination`."""
    seen: set[tuple[str, str]] = set()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        change = event, str(arguments[0])
        if not change[1].startswith(str(destination)) or change in seen:
            return
        seen.add(change)
        if len(seen) == number:
            os._exit(9)

    sys.addaudithook(hook)
    job()


def spread(found: Tensor, wanted: Tensor) -> float:
    """The root mean square of the difference in standard deviations."""
    return ((found.float() - wanted).pow(2).mean().sqrt() / wanted.std()).item()


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference in standard deviations."""
    return ((found - wanted).abs().max() / wanted.std()).item()


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk takes half of a small job; only a power cut could tell."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def exact_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed layers meet activations that are not rounded to int8."""
    monkeypatch.setattr(cpu, "linear", partial(cpu.linear, exact=True))
    monkeypatch.setattr(cpu.MoeLayer, "__call__", partial_method(cpu.MoeLayer.__call__, exact=True))
    monkeypatch.setattr(cpu.Pass, "run", partial_method(cpu.Pass.run, exact=True))


def partial_method(method: Any, **fixed: Any) -> Any:
    return lambda self, *args, **kwargs: method(self, *args, **fixed, **kwargs)
