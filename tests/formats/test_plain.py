"""Floats as they are; codes that nothing describes are named with what the directory says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from glm5.disk.shards import ShardIndex
from glm5.errors import CheckpointError
from glm5.formats.plain import PlainFloats
from tests.checkpoint.checkpoint_fixture import write


@pytest.mark.parametrize(
    ("file", "content", "hint"),
    [
        (
            "hf_quant_config.json",
            {"quantization": {"quant_algo": "NVFP4"}},
            "quantization_config of config.json",
        ),
        ("config.json", {"quantization": {"group_size": 32, "bits": 4}}, "MLX"),
        ("config.json", {"quantization": 3}, "expected a float or FP8"),
        ("other.json", {}, "expected a float or FP8"),
    ],
)
def test_codes_without_a_description_get_a_hint(
    tmp_path: Path, file: str, content: dict[str, object], hint: str
) -> None:
    write(tmp_path / "model.safetensors", {"a.weight": torch.zeros(4, 4, dtype=torch.uint8)})
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"a\.weight is stored as U8") as caught:
        PlainFloats().shape("a.weight", ShardIndex(tmp_path))
    assert hint in str(caught.value)
