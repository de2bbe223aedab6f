"""Calibrated jobs that stop half way: the same call goes on, and every byte is that of an undisturbed job."""

from __future__ import annotations

import os
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from glm5.checkpoint import save_model
from glm5.errors import CheckpointError, Glm5Error
from glm5.layers.loading import load_model
from glm5.quantize import Calibration, quantize
from glm5.quantize.directory import CALIBRATION_FOLDER, WORKING
from glm5.quantize.layer_solver import LayerSolver
from tests.checkpoint.checkpoint_fixture import refused
from tests.checkpoint.test_writing import in_child
from tests.model_fixture import random_ids, tiny_config, tiny_model
from tests.quantize.quantize_fixture import RECIPE, contents, killed_at
from tests.quantize.quantize_fixture import no_flushing as no_flushing

SHARD = 9_000  # bytes: some shards end within a layer
TEXT = Calibration(tuple(tuple(row) for row in random_ids(3, 16, vocab_size=64).tolist()))


def start(source: Path, destination: Path, **options: Any) -> dict[str, Any]:
    return quantize(source, destination, RECIPE, **{"calibration": TEXT, "shard_bytes": SHARD} | options)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a small source, what an undisturbed job makes of it): selections that are shared, and an MTP layer."""
    root = tmp_path_factory.mktemp("interruptions")
    sizes = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1}
    sizes |= {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "vocab_size": 64}
    sizes |= {"q_lora_rank": 32, "v_head_dim": 24, "index_topk_freq": 2, "num_attention_heads": 4}
    save_model(tiny_model(tiny_config("glm_moe_dsa", **sizes)), root / "source", stored="bf16")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the children: sums in the same order
    start(root / "source", root / "whole")
    torch.set_num_threads(threads)
    assert len(list((root / "whole").glob("*.safetensors"))) > 5
    return root / "source", root / "whole"


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "win32", reason="kills a fork")
def test_the_same_call_finishes_a_killed_job(tmp_path: Path, places: tuple[Path, Path]) -> None:
    source, whole = places
    wanted, stages = contents(whole), set()
    for number in range(1, 2000, 23):
        destination = tmp_path / "int4"
        code = in_child(lambda n=number, d=destination: killed_at(n, d, lambda: start(source, d)))  # type: ignore[misc]
        if code == 0:
            break
        assert code == 9
        folder = destination / WORKING / CALIBRATION_FOLDER
        stages.update(path.name for path in folder.glob("hidden-*"))
        stages.update("solved" for _ in folder.glob("*.solved"))
        if not (destination / "config.json").exists():
            with pytest.raises(Glm5Error):
                load_model(destination)
        assert in_child(lambda d=destination: start(source, d)) in (0, 2)  # type: ignore[misc]
        left = contents(destination)
        assert left == wanted, (number, sorted(set(left) ^ set(wanted)))
        shutil.rmtree(destination)
    assert number > 200
    assert {
        "hidden-00001.safetensors",
        "hidden-00002.safetensors",
        "hidden-00003.safetensors",
        "solved",
    } <= stages


def test_no_matrix_is_solved_twice(
    tmp_path: Path, places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at every matrix in turn: each run solves one and goes on where the last one stood."""
    source, _ = places
    solve_one, solved = LayerSolver._solve_one, []

    def one_only(self: LayerSolver, item: Any, *rest: Any) -> None:
        if len(solved) == limit:
            raise KeyboardInterrupt
        solve_one(self, item, *rest)
        solved.append(item.name)

    monkeypatch.setattr(LayerSolver, "_solve_one", one_only)
    limit = 0
    while not (tmp_path / "int4" / "config.json").exists():
        limit += 5
        try:
            receipt = start(source, tmp_path / "int4")
        except KeyboardInterrupt:
            continue
    assert len(solved) == len(set(solved)) > 20
    assert set(solved) <= set(receipt["tensors"])


def test_another_text_or_method_is_another_job(tmp_path: Path, places: tuple[Path, Path]) -> None:
    source, _ = places

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(source, tmp_path / "int4", progress=stop)
    before = contents(tmp_path / "int4")
    for other in (None, Calibration(TEXT.input_ids[1:]), Calibration(TEXT.input_ids, dampening_frac=0.02)):
        with refused(CheckpointError, "another source or recipe"):
            start(source, tmp_path / "int4", calibration=other)
        assert contents(tmp_path / "int4") == before
    start(source, tmp_path / "int4", calibration=None, restart=True)
    start(source, tmp_path / "nearest", calibration=None)
    assert contents(tmp_path / "int4") == contents(tmp_path / "nearest")


@pytest.mark.parametrize("stop_at", [0, 3, 9, 30])
def test_progress_counts_every_byte_once(tmp_path: Path, places: tuple[Path, Path], stop_at: int) -> None:
    calls: list[tuple[int, int]] = []

    def note(done: int, total: int) -> None:
        calls.append((done, total))
        if len(calls) == stop_at:
            raise KeyboardInterrupt

    if stop_at:
        with pytest.raises(KeyboardInterrupt):
            start(places[0], tmp_path / "int4", progress=note)
        calls.clear()
        stop_at = 0
    receipt = start(places[0], tmp_path / "int4", progress=note)
    total = receipt["source_bytes"]
    assert all(of == total for _, of in calls) and calls == sorted(calls)
    assert calls[-1][0] == total
    assert calls[0][0] < total / 2
    assert max(after[0] - before[0] for before, after in pairwise(calls)) < total / 2
