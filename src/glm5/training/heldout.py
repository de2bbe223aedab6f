"""Bits per byte on text the model never saw: the one score that needs no task."""

from __future__ import annotations

import lzma
import math
from collections.abc import Sequence

import torch

from glm5.model.transformer import GlmForCausalLM
from glm5.text.control_tokens import GMASK, SOP
from glm5.text.tokenizer import Tokenizer


@torch.no_grad()
def bits_per_byte(
    model: GlmForCausalLM,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    length: int,
    max_rows: int | None = None,
) -> float:
    """Total code length in bits over UTF-8 bytes; documents are cut into rows of `length` tokens.

    Every token of the text is predicted, a document's first from [gMASK]<sop> alone, as in
    training. Of many rows, `max_rows` evenly spaced ones are scored, against their own bytes.
    """
    start = [tokenizer.control_ids[GMASK], tokenizer.control_ids[SOP]]
    rows = []
    for ids in tokenizer.encode_batch(texts):
        for first in range(0, len(ids), length - 2):
            given = ids[first - 2 : first] if first else start
            rows.append([*given, *ids[first : first + length - 2]])
    if max_rows is not None and len(rows) > max_rows:
        rows = [rows[i * len(rows) // max_rows] for i in range(max_rows)]
    bits, size = 0.0, 0
    for row in rows:
        input_ids = torch.tensor([row], device=model.device)
        losses = torch.nn.functional.cross_entropy(
            model(input_ids).logits[0, 1:-1].float(), input_ids[0, 2:], reduction="sum"
        )
        bits += float(losses) / math.log(2)
        size += sum(len(tokenizer.token_bytes(i)) for i in row[2:])
    return bits / max(size, 1)


def xz_bits_per_byte(texts: Sequence[str]) -> float:
    """What `xz -9e` makes of the same documents, joined."""
    data = "\n".join(texts).encode("utf-8")
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)
