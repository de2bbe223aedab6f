"""What rounding changed in the answers: KL divergence and top-1 agreement on text in both languages.

Source and result read the same windows of text, one after the other, so that memory holds one model;
of the source only its logits are kept.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm5.disk.files import write_atomic
from glm5.errors import CheckpointError
from glm5.quantize.directory import RECEIPT_FILE
from glm5.runtime.language_model import LanguageModel

WINDOW = 256
LANGUAGES = ("en", "zh")


def evaluate(source: Path, destination: Path, texts: dict[str, str] | None = None) -> dict[str, Any]:
    """Compare two checkpoints and note it in the receipt of `destination`; returns what was noted.

    texts: language to text; None = the shipped held-out texts. Needs the source to fit in memory.
    Per language: tokens, kl (mean KL(source || result), nats), top1 (share of equal best tokens),
    perplexity of both.

    Raises CheckpointError when the source has no tokenizer or a text gives too few tokens.
    """
    texts = texts or {name: _shipped(name) for name in LANGUAGES}
    model = LanguageModel.load(source)
    if model.tokenizer is None:
        raise CheckpointError(f"{source}: has no tokenizer.json, so no text can be read; evaluate without it")
    windows = {name: _windows(model.tokenizer.encode(text), name) for name, text in texts.items()}
    before = {name: [_logits(model, ids) for ids in rows] for name, rows in windows.items()}
    del model
    model = LanguageModel.load(destination)
    found = {}
    for name, rows in windows.items():
        kl = top1 = tokens = 0.0
        losses = [0.0, 0.0]
        for ids, reference in zip(rows, before[name], strict=True):
            p, q = reference.float().log_softmax(-1), _logits(model, ids).float().log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum())
            top1 += float((p.argmax(-1) == q.argmax(-1)).sum())
            following = torch.tensor(ids[1:]).unsqueeze(1)
            for place, logs in enumerate((p, q)):
                losses[place] -= float(logs[:-1].gather(1, following).sum())
            tokens += len(ids)
        predicted = tokens - len(rows)
        found[name] = {
            "tokens": int(tokens),
            "kl": round(kl / tokens, 5),
            "top1": round(top1 / tokens, 4),
            "perplexity": [round(float(torch.tensor(loss / predicted).exp()), 4) for loss in losses],
        }
    _note(destination / RECEIPT_FILE, found)
    return found


def _shipped(name: str) -> str:
    return resources.files("glm5.evaluation").joinpath("heldout", f"{name}.txt").read_text(encoding="utf-8")


def _windows(ids: list[int], name: str) -> list[list[int]]:
    rows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise CheckpointError(f"the text for {name} gives {len(ids)} tokens; give at least two")
    return rows


@torch.inference_mode()
def _logits(model: LanguageModel, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids], device=model.device)).logits[0].cpu()


def _note(path: Path, found: dict[str, Any]) -> None:
    receipt = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_atomic(path, json.dumps({**receipt, "evaluation": found}, indent=1, ensure_ascii=False) + "\n")
