"""A corpus of a few kilobytes on disk, and a recipe that trains on it in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from glm5.training.recipe import Recipe

_ENGLISH = "The quick brown fox number {n} jumps over the lazy dog and runs to hill {m}."
_CHINESE = "第{n}只狐狸跳过懒狗，跑到第{m}座山上去看月亮。"


def write_corpus(directory: Path) -> Path:
    """English, Chinese and chat rows, with a held-out part."""
    texts = {
        "english": ("en", [" ".join(_ENGLISH.format(n=i, m=i + k) for k in range(8)) for i in range(60)]),
        "chinese": ("zh", ["".join(_CHINESE.format(n=i, m=i + k) for k in range(8)) for i in range(60)]),
    }
    (directory / "heldout").mkdir(parents=True)
    for name, (language, documents) in texts.items():
        rows = [
            {"text": text, "source": name, "language": language, "licence": "CC0-1.0"} for text in documents
        ]
        _write(directory / f"{name}.jsonl", rows[:-4])
        _write(directory / "heldout" / f"{name}.jsonl", rows[-4:])
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"fox {n}?"},
                {"role": "assistant", "content": f"fox {n} jumps"},
            ],
            "task": "fox",
            "source": "glm5",
            "licence": "Apache-2.0",
        }
        for n in range(80)
    ]
    _write(directory / "tasks-fox.jsonl", chats)
    return directory


def tiny_recipe(tmp: Path, **changes: Any) -> Recipe:
    """A recipe over the small corpus; `changes` are dotted keys with `__` for the dot."""
    raw: dict[str, Any] = {
        "name": "tiny",
        "seed": 3,
        "output": tmp / "run",
        "model": {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "index_topk": 16,
            "index_n_heads": 4,
            "index_head_dim": 8,
            "indexer_types": ["full", "full", "shared"],
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "num_nextn_predict_layers": 1,
            "tie_word_embeddings": True,
            "max_position_embeddings": 256,
        },
        "tokenizer": {"vocab_size": 400},
        "data": {
            "corpus": tmp / "corpus",
            "shards": tmp / "shards",
            "sequence_length": 48,
            "stages": [
                {"until": 0.5, "mix": {"en": 1.0, "zh": 1.0}},
                {"until": 1.0, "mix": {"en": 0.5, "zh": 0.5, "tasks-fox": 1.0}},
            ],
        },
        "loss": {"indexer_every": 2},
        "run": {"steps": 8, "batch_rows": 4, "save_every": 4, "eval_every": 4, "eval_rows": 2},
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        section = raw
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    if not (tmp / "corpus").exists():
        write_corpus(tmp / "corpus")
    return Recipe.model_validate(raw)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
