"""From a snapshot to the released directories and their measured cards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import glm5
from glm5.layers.packed import TiedHead
from glm5.quantize import Recipe
from glm5.text.tokenizer import Tokenizer
from glm5.training.loop import Trainer
from recipes.nano import card
from recipes.nano.release import CALIBRATION_ROWS, main, release, training_text
from tests.training.corpus_fixture import tiny_recipe

WIDTHS = {
    "model__hidden_size": 64, "model__q_lora_rank": 32, "model__kv_lora_rank": 32,
    "model__moe_intermediate_size": 32,
}  # fmt: skip


def test_both_models_are_written_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "QUESTIONS_PER_TASK", 3)
    recipe = tiny_recipe(tmp_path, run__steps=2, run__save_every=2, **WIDTHS)
    source = {"package": "foxes", "version": "1", "language": "en", "bytes": 5_000_000, "licence": "CC0-1.0"}
    (recipe.data.corpus / "manifest.json").write_text(json.dumps({"sources": {"english": source}}))
    snapshot = Trainer(recipe).train()
    packing = Recipe(4, 32, (("*.embed_tokens", 8, 64),))
    release(recipe, snapshot, tmp_path / "fp8", tmp_path / "int4", "Two steps only.", packing)

    floats, packed = (glm5.load(tmp_path / name) for name in ("fp8", "int4"))
    assert isinstance(packed.lm_head, TiedHead)
    ids = torch.arange(2, 22).unsqueeze(0)
    with torch.inference_mode():
        gap = (floats(ids).logits - packed(ids).logits).norm() / floats(ids).logits.norm()
    assert 0 < gap < 0.2
    assert sum(f.stat().st_size for f in (tmp_path / "int4").iterdir()) < 0.9 * sum(
        f.stat().st_size for f in (tmp_path / "fp8").iterdir()
    )
    for name, stored in (("fp8", "e4m3"), ("int4", "int4")):
        text = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        assert stored in text and "Two steps only." in text and "| english | foxes 1 | en | 5.00 |" in text
        assert "| fox | " in text and " of 3 (" in text


def test_the_calibration_is_of_whole_pieces_of_the_last_mix(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, **WIDTHS)
    Trainer(recipe)
    tokenizer = Tokenizer.from_pretrained(recipe.shard_dir)
    windows = training_text(recipe, tokenizer).input_ids
    tokens = sum(map(len, windows))
    assert 0.7 * CALIBRATION_ROWS * 48 < tokens <= CALIBRATION_ROWS * 48
    assert len(set(windows)) > 100
    user = tokenizer.control_ids["<|user|>"]
    assert 0 < sum(user in window for window in windows) < len(windows)


def test_what_is_no_snapshot_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "is no snapshot of a run" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
