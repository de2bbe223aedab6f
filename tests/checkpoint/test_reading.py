"""Directories in: round trips of every type and format, and what other writers may do."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glm5.checkpoint import save_model
from glm5.checkpoint.names import pieces, state_tensors
from glm5.config import MODEL_TYPES
from glm5.disk.shards import INDEX_FILE
from glm5.formats.fp8 import block_dequantize, block_quantize, is_quantized
from glm5.layers.loading import load_model
from tests.checkpoint.checkpoint_fixture import (
    FIRST,
    SHARD,
    Tensors,
    assert_same_bits,
    read,
    weights,
    with_json,
    with_tensors,
)
from tests.checkpoint.checkpoint_fixture import copy_of as copy_of
from tests.checkpoint.checkpoint_fixture import stored as stored
from tests.model_fixture import random_ids, tiny_config, tiny_model

# --- round trips -----------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard_bytes", [SHARD, 10**9], ids=["shards", "one file"])
@pytest.mark.parametrize("stored_as", ["fp32", "fp16", "bf16", "fp8"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_is_written_is_read(
    tmp_path: Path, model_type: str, stored_as: str, shard_bytes: int, tied: bool
) -> None:
    model = tiny_model(tiny_config(model_type, tie_word_embeddings=tied))
    save_model(model, tmp_path, stored=stored_as, shard_bytes=shard_bytes)
    again = load_model(tmp_path)

    assert (tmp_path / INDEX_FILE).exists() == (shard_bytes == SHARD)
    assert again.dtype == {"fp32": torch.float32, "fp16": torch.float16}.get(stored_as, torch.bfloat16)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert_same_bits(weights(again), {k: v.to(weights(again)[k].dtype) for k, v in through(model, stored_as)})
    assert_same_bits(weights(load_model(tmp_path, dtype=torch.float32)), dict(through(model, stored_as)))


def through(model: Any, stored_as: str) -> list[tuple[str, Tensor]]:
    """The weights in fp32 after they were stored in a format; router biases stay as they are."""
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(stored_as, torch.bfloat16)
    tensors = weights(model)
    for piece in pieces(model):
        part = piece.of(tensors[piece.parameter])
        if stored_as == "fp8" and is_quantized(piece.name):
            part.copy_(block_dequantize(*block_quantize(part)))
        elif not piece.name.endswith("e_score_correction_bias"):
            part.copy_(part.to(dtype))
    if model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return list(tensors.items())


def test_a_loaded_model_computes_the_same(tmp_path: Path) -> None:
    model, ids = tiny_model(), random_ids(2, 20)
    save_model(model, tmp_path, shard_bytes=SHARD)
    seen: list[tuple[int, int]] = []
    again = load_model(tmp_path, progress=lambda done, total: seen.append((done, total)))
    with torch.no_grad():
        # PyTorch and the native kernels add up in different orders.
        torch.testing.assert_close(model(ids).logits, again(ids).logits, atol=1e-4, rtol=1e-4)
    assert not again.training
    assert seen[-1][0] == seen[-1][1] == sum(t.numel() * 4 for t in state_tensors(model).values())
    assert seen == sorted(seen)


# --- what other writers do -------------------------------------------------------------------


def fuse_experts(tensors: Tensors) -> None:
    for bank in [name for name in tensors if name.endswith("experts.0.down_proj.weight")]:
        bank = bank.removesuffix(".0.down_proj.weight")
        gate, up, down = (
            torch.stack([tensors.pop(f"{bank}.{expert}.{part}_proj.weight") for expert in range(8)])
            for part in ("gate", "up", "down")
        )
        tensors |= {f"{bank}.gate_up_proj": torch.cat((gate, up), dim=1), f"{bank}.down_proj": down}


def borrow(tensors: Tensors) -> None:
    """What DeepSeek-like checkpoints store a second time; NaN, so that reading it would show."""
    copy = torch.full((256, 64), float("nan"), dtype=torch.bfloat16)
    tensors["model.layers.3.embed_tokens.weight"] = tensors["model.layers.3.shared_head.head.weight"] = copy
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = copy[0]


@pytest.mark.parametrize("stored_as", ["fp8", "fp32"])
def test_a_model_may_be_loaded_in_inference_mode(tmp_path: Path, stored_as: str) -> None:
    save_model(tiny_model(tiny_config()), tmp_path / "model", stored=stored_as)
    with torch.inference_mode():
        found = load_model(tmp_path / "model", dtype=torch.bfloat16)
    wanted = load_model(tmp_path / "model", dtype=torch.bfloat16)
    assert_same_bits(found.state_dict(), wanted.state_dict())
    found(random_ids(1, 4)).logits.sum().backward()  # and trained all the same


def test_fused_experts_and_borrowed_tensors_are_accepted(stored: Any, copy_of: Any) -> None:
    wanted = weights(load_model(stored["bf16"]))
    for change in (fuse_experts, borrow):
        directory = copy_of("bf16")
        with_tensors(directory, change)
        assert_same_bits(weights(load_model(directory)), wanted)
        shutil.rmtree(directory)


def test_a_tied_head_may_be_stored_all_the_same(tmp_path: Path) -> None:
    model = tiny_model(tiny_config(tie_word_embeddings=True))
    save_model(model, tmp_path)
    with_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(256, 64)}))
    assert_same_bits(weights(load_model(tmp_path)), weights(model))


def test_an_absent_mtp_layer_is_left_out(stored: Any, copy_of: Any) -> None:
    directory = copy_of("bf16")
    with_tensors(directory, lambda tensors: [tensors.pop(n) for n in list(tensors) if ".layers.3." in n])
    model = load_model(directory)
    assert len(model.mtp) == model.config.num_nextn_predict_layers == 0
    wanted = weights(load_model(stored["bf16"]))
    assert_same_bits(weights(model), {k: v for k, v in wanted.items() if not k.startswith("mtp.")})


def test_an_mtp_layer_that_nobody_asks_for_is_ignored(copy_of: Any) -> None:
    directory = copy_of("bf16")
    with_json(directory / "config.json", lambda config: config.update(num_nextn_predict_layers=0))
    assert len(load_model(directory).mtp) == 0


def test_links_of_the_hub_cache_and_unused_files_are_accepted(stored: Any, copy_of: Any) -> None:
    directory = copy_of("shards")
    blobs = directory / "blobs"
    blobs.mkdir()
    os.rename(directory / FIRST, blobs / "0a1b")
    (directory / FIRST).symlink_to("blobs/0a1b")
    (directory / "model-00001-of-00002.safetensors").write_bytes(b"not in the index")
    assert_same_bits(weights(load_model(directory)), weights(load_model(stored["bf16"])))


def test_only_the_named_files_of_a_sound_checkpoint_matter(stored: Any) -> None:
    shards = sorted(stored["shards"].glob("*.safetensors"))
    assert shards[0].name == FIRST and len(shards) == 5
    merged: Tensors = {}
    for path in shards:
        merged |= read(path)
    assert_same_bits(merged, read(stored["bf16"] / "model.safetensors"))
