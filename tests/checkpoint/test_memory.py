"""Loading takes the model and one stored tensor, measured by the kernel in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glm5.checkpoint import save_model
from glm5.disk.shards import ShardIndex
from glm5.model.transformer import GlmForCausalLM
from tests.model_fixture import tiny_config

MB = 1 << 20
SLACK = 10 * MB  # what is first touched here; the largest tensor in fp32 is 34 MB

MEASURE = """
import json, sys
from pathlib import Path
import torch
from glm5.layers.loading import load_model

def status(key):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
directory, dtype, warm_up = sys.argv[1:]
load_model(Path(warm_up), dtype=getattr(torch, dtype))
try:
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
except OSError:
    pass
before = status("VmRSS")
model = load_model(Path(directory), dtype=getattr(torch, dtype))
held = sum(t.numel() * t.element_size() for t in model.state_dict().values())
print(json.dumps({"peak": status("VmHWM") - before, "model": held}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("stored", "dtype"), [("fp32", "float32"), ("bf16", "float32"), ("fp8", "bfloat16")])
def test_the_peak_is_the_model_and_one_tensor(tmp_path: Path, stored: str, dtype: str) -> None:
    """46 M weights, the largest matrix 8.4 M: 184 MB and 34 MB in fp32."""
    sizes = {"hidden_size": 512, "intermediate_size": 16384, "moe_intermediate_size": 1024}
    config = tiny_config(
        vocab_size=8192, num_hidden_layers=2, num_nextn_predict_layers=0, n_routed_experts=8, **sizes
    )
    with torch.device("meta"):
        model = GlmForCausalLM(config)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(0.01)
    save_model(model, tmp_path / "large", stored=stored, shard_bytes=50_000_000)
    del model
    small = GlmForCausalLM(tiny_config())
    small.reset_parameters()
    save_model(small, tmp_path / "small", stored=stored)
    index = ShardIndex(tmp_path / "large")
    one_tensor = max(index[name].num_bytes for name in index.names)

    command = [sys.executable, "-c", MEASURE, str(tmp_path / "large"), dtype, str(tmp_path / "small")]
    root = str(Path(__file__).parents[2])
    # glibc gives freed tensors back at once, instead of raising its threshold after the first ones.
    environment = os.environ | {"PYTHONPATH": root, "MALLOC_MMAP_THRESHOLD_": str(MB)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env=environment)
    measured = json.loads(done.stdout)
    print(f"{stored} as {dtype}: model {measured['model'] / MB:.0f} MB, peak {measured['peak'] / MB:.0f} MB")

    assert measured["model"] > 80 * MB
    assert measured["peak"] <= measured["model"] + one_tensor + SLACK
    assert measured["peak"] >= 0.9 * measured["model"]  # else the measurement is broken
