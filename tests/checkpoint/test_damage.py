"""Damaged directories: each is refused in one line that names the file and the tensor."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glm5.disk.shards import INDEX_FILE
from glm5.errors import CheckpointError, ConfigError
from glm5.layers.loading import load_model
from tests.checkpoint.checkpoint_fixture import FIRST, Tensors, refused, with_json, with_tensors
from tests.checkpoint.checkpoint_fixture import copy_of as copy_of
from tests.checkpoint.checkpoint_fixture import stored as stored

GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"
BANK = "model.layers.1.mlp.experts"

# --- the damage, then the words that the message must hold --------------------------------------


def put(name: str, tensor: Tensor | None = None) -> Callable[[Path], None]:
    """Replace a tensor; None takes it away."""

    def change(tensors: Tensors) -> None:
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor

    return lambda directory: with_tensors(directory, change)


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: with_json(directory / "config.json", lambda raw: raw.update(changes))


def place(tensor: str, shard: Any) -> Callable[[Path], None]:
    """Change one entry of the index; None takes it away."""

    def change(raw: dict[str, Any]) -> None:
        raw["weight_map"].pop(tensor) if shard is None else raw["weight_map"].update({tensor: shard})

    return lambda directory: with_json(directory / INDEX_FILE, change)


def file(name: str, content: bytes | None) -> Callable[[Path], Any]:
    return lambda directory: (
        (directory / name).write_bytes(content) if content else (directory / name).unlink()
    )


SCALE = GATE + "_scale_inv"
HEAD = "model.embed_tokens.weight"
NAN, SMALL = torch.tensor([[float("nan")]]), torch.zeros(2, 2)
FP8 = torch.zeros(40, 64).to(torch.float8_e4m3fn)
quantized = {"quant_method": "fp8"}
BF16_DAMAGE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "missing": (put("lm_head.weight"), ("lm_head.weight is missing",)),
    "missing expert": (put(GATE), (GATE,)),
    "missing MTP": (put("model.layers.3.enorm.weight"), ("model.layers.3.enorm.weight",)),
    "extra": (put("model.extra", SMALL), ("model.safetensors", "model.extra has no place")),
    "extra expert": (put(BANK + ".8.up_proj.weight", SMALL), (BANK + ".8.up_proj.weight",)),
    "extra, unprintable": (put("model.\nextra", SMALL), ("model.safetensors", "model.\\nextra")),
    "extra, endless layer": (put(f"model.layers.{'9' * 5000}.x", SMALL), ("model.layers.999",)),
    "scale of no FP8": (put(SCALE, SMALL), (SCALE,)),
    "fused and not": (put(BANK + ".gate_up_proj", torch.zeros(8, 80, 64)), (BANK, "a second time")),
    "shape": (put(GATE, torch.zeros(64, 40)), ("model.safetensors", GATE, "[64, 40]", "[40, 64]")),
    "a number": (put(GATE, torch.tensor(1.0)), (GATE, "[]")),
    "dtype": (put(GATE, torch.zeros(40, 64).int()), ("model.safetensors", GATE, "I32")),
    "FP8 bias": (
        put("model.norm.weight", torch.zeros(64).to(torch.float8_e4m3fn)),
        ("model.norm.weight", "only matrices"),
    ),
    "FP8 without scale": (put(GATE, FP8), ("model.safetensors", GATE, SCALE + " is missing")),
    "cut": (lambda d: os.truncate(d / "model.safetensors", 300_000), ("model.safetensors", "download")),
    "quantization": (config(quantization_config={"quant_method": "exl9"}), ("config.json", "exl9")),
    "quantization, a list": (config(quantization_config=["fp8"]), ("config.json", "['fp8']")),
    "blocks": (config(quantization_config=quantized | {"weight_block_size": [128]}), ("[128]",)),
    "blocks, bool": (config(quantization_config=quantized | {"weight_block_size": [True, 1]}), ("True",)),
    "blocks, huge": (config(quantization_config=quantized | {"weight_block_size": [1, 1 << 70]}), ("block",)),
    "no weights": (file("model.safetensors", None), ("has neither",)),
    "wider": (config(hidden_size=65), ("model.safetensors", "[256, 64]", "[256, 65]")),
}
SHARD_DAMAGE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "missing shard": (file(FIRST, None), (FIRST, "no such file")),
    "not in its shard": (place(HEAD, "model-00002-of-00005.safetensors"), (INDEX_FILE, HEAD, "lacks")),
    "not in the index": (place(HEAD, None), (FIRST, HEAD)),
    "no name": (place(HEAD, 3), (INDEX_FILE, HEAD)),
    "no map": (file(INDEX_FILE, b'{"weight_map": []}'), (INDEX_FILE, "weight_map")),
    "empty map": (file(INDEX_FILE, b'{"weight_map": {}}'), (INDEX_FILE, "weight_map")),
    **{f"index {raw!r:.12}": (file(INDEX_FILE, raw), (INDEX_FILE, "JSON"))
       for raw in (b"{", b"\xff", b"[" * 200_000, b"9" * 5000)},
    **{f"shard {name!r:.30}": (place(HEAD, name), (INDEX_FILE, "is not a .safetensors file name"))
       for name in ("../x/" + FIRST, "..", "", ".", "/etc/" + FIRST, "a\\" + FIRST, "C:" + FIRST,
                    "./" + FIRST, "x\0.safetensors", "x\n.safetensors", "\ud800.safetensors", "x.bin",
                    "x" * 300 + FIRST)},
}  # fmt: skip
FP8_DAMAGE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "NaN scale": (put(SCALE, NAN), ("model.safetensors", SCALE, "NaN")),
    "infinite scale": (put(SCALE, 1 / torch.zeros(1, 1)), ("model.safetensors", SCALE, "infinite")),
    "missing scale": (put(SCALE), ("model.safetensors", GATE, SCALE)),
    "scale shape": (put(SCALE, SMALL), ("model.safetensors", SCALE, "[2, 2]", "[1, 1]")),
    "scale, a number": (put(SCALE, torch.tensor(1.0)), (SCALE, "[]", "[1, 1]")),
    "scale dtype": (put(SCALE, torch.ones(1, 1).int()), (SCALE, "I32")),
    "other blocks": (
        config(quantization_config=quantized | {"weight_block_size": [64, 64]}),
        ("_scale_inv",),
    ),
}
DAMAGE = [("bf16", BF16_DAMAGE), ("shards", SHARD_DAMAGE), ("fp8", FP8_DAMAGE)]


@pytest.mark.parametrize(("base", "what"), [(base, what) for base, cases in DAMAGE for what in cases])
def test_damage_is_refused_by_file_and_tensor(copy_of: Any, base: str, what: str) -> None:
    damage, words = dict(DAMAGE)[base][what]
    directory = copy_of(base)
    damage(directory)
    with refused(CheckpointError, directory, *words):
        load_model(directory)


@pytest.mark.parametrize(
    "sizes", [{"vocab_size": 2**62}, {"hidden_size": 2**40}, {"n_routed_experts": 10**4000}]
)
def test_sizes_past_any_machine_are_refused(copy_of: Any, sizes: dict[str, int]) -> None:
    directory = copy_of("bf16")
    config(**sizes)(directory)
    with refused(ConfigError, directory / "config.json"):
        load_model(directory)


@pytest.mark.parametrize(
    "raw", [None, b"{", b"\xff", b"[]", b'{"model_type": "glm_moe_dsa", "hidden_size": -1}']
)
def test_a_damaged_config_is_refused(copy_of: Any, raw: bytes | None) -> None:
    directory = copy_of("bf16")
    file("config.json", raw)(directory)
    with refused(ConfigError, directory / "config.json"):
        load_model(directory)


class Trap:
    """Unpickling it leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("sprung"),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pt", "model.safetensors"])
def test_a_pickle_is_never_opened(copy_of: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    directory = copy_of("bf16")
    monkeypatch.chdir(directory)
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(pickle.dumps({"weights": Trap()}))
    with refused(CheckpointError, directory, "download" if "safetensors" in name else "never unpickles"):
        load_model(directory)
    assert not Path("sprung").exists()
    pickle.loads((directory / name).read_bytes())
    assert Path("sprung").exists()  # the trap works
