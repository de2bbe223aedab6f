"""How a weight is stored: names, shape, values; one file a format.

`formats_of` goes from the `quantization_config` of a `config.json` to the formats that a directory's weights
may have: the quantized one first, plain floats last. A format tells which tensors on disk make up a weight,
checks them and reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from glm5.formats.awq import Awq
from glm5.formats.block_fp8 import BlockFp8
from glm5.formats.compressed_tensors import CompressedTensors
from glm5.formats.format import Format
from glm5.formats.gptq import Gptq
from glm5.formats.groups import Group
from glm5.formats.modelopt import METHODS, ModelOpt
from glm5.formats.mxfp4 import Mxfp4
from glm5.formats.plain import PlainFloats
from glm5.formats.settings import Settings

__all__ = ["CompressedTensors", "Format", "Group", "PlainFloats", "format_of", "formats_of"]

_FORMATS: dict[str, Callable[[Settings], Format]] = {
    "fp8": BlockFp8,
    "compressed-tensors": CompressedTensors,
    **dict.fromkeys(METHODS, ModelOpt),
    "gptq": Gptq,
    "awq": Awq,
    "mxfp4": Mxfp4,
    "quark": Mxfp4,
}


def formats_of(settings: Mapping[str, Any], where: Path) -> tuple[Format, ...]:
    """How the weights of a checkpoint may be stored; the first that knows a weight counts.

    settings: the `quantization_config` object of a config.json, {} without one; nothing in it is trusted.
    where: that config.json, for messages.

    Raises:
        CheckpointError: an unknown method, layout or number of bits, or a value of a wrong type.
    """
    return format_of(settings, where), PlainFloats()


def format_of(settings: Mapping[str, Any], where: Path) -> Format:
    """How a checkpoint stores its quantized weights.

    settings: the `quantization_config` object of a config.json; nothing in it is trusted.
    where: that config.json, for messages.

    Raises:
        CheckpointError: an unknown method, layout or number of bits, or a value of a wrong type.
    """
    checked = Settings(settings, f"{where}: quantization_config")
    return _FORMATS[checked.choice("quant_method", tuple(_FORMATS), "fp8")](checked)
