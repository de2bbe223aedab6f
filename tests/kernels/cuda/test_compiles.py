"""Every program compiles to machine code for the GPUs it is meant for, and as it was meant.

No GPU is needed for that. What a program computes there is not seen, only that it can run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="pip install 'glm5[cuda]'")

PROGRAMS = {
    "few_rows", "add_parts", "many_rows", "few_gate_up", "few_down", "add_topk", "many_gate_up", "many_down",
    "attend_chunk", "join_chunks", "index",
}  # fmt: skip
# Bytes of shared memory of the smallest GPU of that kind: A100 and RTX 30, RTX 40, H100.
SMALLEST = {80: 99 << 10, 90: 227 << 10}


@pytest.fixture(scope="module", params=sorted(SMALLEST))
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(compute capability, what `compile_all.py` printed)"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, str(Path(__file__).with_name("compile_all.py")), str(request.param)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return request.param, [json.loads(line) for line in done.stdout.splitlines()]


def test_programs_become_machine_code_that_fits(compiled: tuple[int, list[dict[str, Any]]]) -> None:
    capability, found = compiled
    assert {made["program"] for made in found} == PROGRAMS
    assert all(made["cubin"] > 0 and made["shared"] <= SMALLEST[capability] for made in found)


def test_weights_are_read_in_whole_words_and_prompts_use_tensor_cores(
    compiled: tuple[int, list[dict[str, Any]]],
) -> None:
    for made in compiled[1]:
        if made["program"] in ("few_rows", "few_gate_up", "few_down"):
            assert made["wide_loads"] >= 4, made
        if made["program"].startswith("many_"):
            assert made["tensor_core"] > 0, made


def test_rows_side_by_side_are_summed_in_the_same_order(compiled: tuple[int, list[dict[str, Any]]]) -> None:
    """The layout of a sum decides its order: with 1, 2 and 4 rows in a program it is the same."""
    layouts: dict[str, set[str]] = {}
    for made in compiled[1]:
        if made["program"] == "few_rows":
            layouts.setdefault(str(made["together"]), set()).update(made["sum_layouts"])
    assert set(layouts) == {"1", "2", "4"} and layouts["1"]
    assert layouts["1"] == layouts["2"] == layouts["4"]
