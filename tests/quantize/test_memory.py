"""Quantizing takes one tensor and what becomes of it, measured by the kernel in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glm5.checkpoint import ShardIndex, names, save_model
from glm5.disk.safetensors_file import PlannedTensor, write_safetensors
from glm5.disk.shards import SINGLE_FILE
from glm5.model.transformer import GlmForCausalLM
from glm5.quantize.sources import BAND_BYTES
from tests.quantize.quantize_fixture import save_source, small_config

MB = 1 << 20
SLACK = 10 * MB  # what is first touched here

MEASURE = """
import json, sys
from pathlib import Path
import torch
from glm5.quantize import Recipe, quantize

def status(key):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
large, small, out = map(Path, sys.argv[1:])
quantize(small, out / "small", Recipe(4, 32))
try:
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
except OSError:
    pass
before = status("VmRSS")
quantize(large, out / "large", Recipe(4, 32))
print(json.dumps(status("VmHWM") - before))
"""


def measured(program: str, directory: Path) -> int:
    """What a program prints that is given the paths large, small and out."""
    command = [sys.executable, "-c", program, *(str(directory / name) for name in ("large", "small", "out"))]
    # glibc gives freed tensors back at once, instead of raising its threshold after the first ones.
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "MALLOC_MMAP_THRESHOLD_": str(MB),
    }
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(json.loads(done.stdout))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_one_tensor_and_its_codes(tmp_path: Path) -> None:
    """19 M weights in fp32, 76 MB; the largest matrix has 17 MB."""
    sizes = {"hidden_size": 256, "intermediate_size": 16384, "moe_intermediate_size": 512}
    with torch.device("meta"):
        model = GlmForCausalLM(small_config(vocab_size=8192, num_nextn_predict_layers=0, **sizes))
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(0.01)
    save_model(model, tmp_path / "large", stored="fp32")
    save_source(tmp_path / "small")
    index = ShardIndex(tmp_path / "large")
    largest = max(index[name].num_bytes for name in index.names)

    peak = measured(MEASURE, tmp_path)
    print(f"largest tensor {largest / MB:.0f} MB, peak {peak / MB:.0f} MB")

    assert sum(index[name].num_bytes for name in index.names) > 70 * MB
    assert 0.9 * largest < peak < 1.25 * largest + SLACK


MEASURE_HEAD = MEASURE.replace(
    'quantize(large, out / "large", Recipe(4, 32))',
    'quantize(large, out / "large", Recipe(4, 32, (("lm_head", 8), ("*.embed_tokens", 8))))',
)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_head_is_rounded_in_bands(tmp_path: Path) -> None:
    """Embedding and head of 168 MB each, in bf16; their codes are half of that."""
    config = small_config(vocab_size=1_310_720, num_nextn_predict_layers=0)
    with torch.device("meta"):
        model = GlmForCausalLM(config)
    model.to_empty(device="cpu").bfloat16()
    for tensor in model.state_dict().values():
        tensor.fill_(0.01)
    save_model(model, tmp_path / "large", stored="bf16")
    del model
    save_source(tmp_path / "small")
    head = config.vocab_size * config.hidden_size
    peak = measured(MEASURE_HEAD, tmp_path)
    print(f"peak {peak / MB:.0f} MB")
    # Codes and scales of one of them, a band and its codes.
    assert peak < head * 8.5 / 8 + BAND_BYTES * 1.6 + 2 * SLACK < 2.7 * head


MEASURE_CALIBRATED = MEASURE.replace(
    "from glm5.quantize import Recipe, quantize",
    "from glm5.quantize import Calibration, Recipe, quantize\n"
    "text = Calibration(tuple(tuple(range(start, start + 64)) for start in range(8)))",
).replace("Recipe(4, 32))", "Recipe(4, 32), calibration=text)")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_calibrated_job_holds_one_expert(tmp_path: Path) -> None:
    """20 experts of 0.8 M weights: 63 MB as the floats that are multiplied."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "n_routed_experts": 20}
    sizes |= {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    save_source(tmp_path / "large", small_config(**sizes))
    save_source(tmp_path / "small")
    peak = measured(MEASURE_CALIBRATED, tmp_path)
    print(f"peak {peak / MB:.0f} MB")
    # Three matrices, two Hessians and a factor's workspace: each 1 MB. Hidden states: 1 MB.
    assert peak < 36 * MB + SLACK


MEASURE_LOADING = (
    MEASURE.replace("import Recipe, quantize", "import Recipe")
    .replace("def status", "from glm5.layers.loading import load_model\n\ndef status")
    .replace(
        'quantize(small, out / "small", Recipe(4, 32))', "load_model(small, quantize=Recipe(4, 32).scheme_of)"
    )
    .replace(
        'quantize(large, out / "large", Recipe(4, 32))',
        "model = load_model(large, quantize=Recipe(4, 32).scheme_of)\n"
        "before += sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])",
    )
)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_expert_is_rounded_while_loading_without_its_bank(tmp_path: Path) -> None:
    """32 experts of 1.5 M weights in fp32: banks of 128 and 64 MB, 2 MB a matrix."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 1024, "n_routed_experts": 32}
    sizes |= {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    config = small_config(**sizes)
    with torch.device("meta"):
        tensors = names.state_tensors(GlmForCausalLM(config))
    (tmp_path / "large").mkdir()
    config.save_pretrained(tmp_path / "large")
    planned = [
        PlannedTensor(name, torch.float32, tuple(t.shape), lambda t=t: torch.full(t.shape, 0.01))
        for name, t in tensors.items()
    ]
    write_safetensors(tmp_path / "large" / SINGLE_FILE, planned)
    del planned
    save_source(tmp_path / "small")
    peak = measured(MEASURE_LOADING, tmp_path)
    print(f"peak {peak / MB:.0f} MB above the model")
    assert -SLACK < peak < 2 * 2 * MB + SLACK
