"""Reading takes the values and a few megabytes, measured by the kernel in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.gguf.gguf_fixture import raw_file, tensor

MB = 1 << 20
EXPERTS, ROWS, WIDTH = 64, 1024, 2048  # one expert is 8 MB in fp32, the bank 512 MB
BYTES = EXPERTS * ROWS * WIDTH // 256 * 144
SLACK = 6 * MB

MEASURE = """
import json, sys
from pathlib import Path
import torch
from glm5.checkpoint.gguf import GgufFile

def status(key):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
found = GgufFile(sys.argv[1])
found.read("w", slice(0, 1), expert=0)  # what is first touched
peaks = []
for rows, expert in ((None, 5), (slice(0, 128), 63)):
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    except OSError:
        pass
    before = status("VmRSS")
    found.read("w", rows, expert=expert)
    peaks.append(status("VmHWM") - before)
print(json.dumps(peaks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_expert_is_read_without_its_bank(tmp_path: Path) -> None:
    """Q4_K zeros, as a sparse file."""
    path = tmp_path / "a.gguf"
    header = raw_file(tensors=[tensor("w", [WIDTH, ROWS, EXPERTS], 12)])
    path.write_bytes(header)
    os.truncate(path, len(header) + BYTES)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True, timeout=60
    )
    expert, rows = json.loads(done.stdout)
    assert expert < 4 * ROWS * WIDTH + SLACK
    assert rows < 4 * 128 * WIDTH + SLACK
