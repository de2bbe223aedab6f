"""Token shards: one memory-mapped file of ids a source, with the borders of its documents.

`<source>.tokens` holds uint16 (uint32 for large vocabularies) ids, `<source>.documents.npy` int64
rows (start, end, prompt): the loss falls on ids after `prompt`. `shards.json` keeps language,
licence and counts of each source and the checksum of the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glm5.disk.files import atomic_path, write_atomic
from glm5.errors import RecipeError
from glm5.text.control_tokens import ENDOFTEXT, GMASK, SOP, USER
from glm5.text.tokenizer import Tokenizer

INDEX = "shards.json"
_BATCH = 512


@dataclass(frozen=True)
class ShardInfo:
    """What `shards.json` says of a source. Chat sources are never cut in the middle of a row."""

    source: str
    language: str
    licence: str
    chat: bool
    documents: int
    tokens: int
    bytes: int  # of UTF-8 text


@dataclass(frozen=True)
class Shard:
    """An opened shard."""

    info: ShardInfo
    tokens: np.ndarray  # memory-mapped
    documents: np.ndarray  # int64 [documents, 3]


def corpus_files(corpus: Path) -> list[Path]:
    """The JSONL files of a corpus directory, in a fixed order."""
    files = sorted(corpus.glob("*.jsonl"))
    if not files:
        raise RecipeError(
            f"{corpus}: holds no .jsonl files; run `python -m recipes.nano.build {corpus}`"
        )
    return files


def sample_texts(corpus: Path, megabytes: float) -> Iterator[str]:
    """Text for a tokenizer: every source in proportion to its size, documents spread evenly."""
    files = corpus_files(corpus)
    share = min(1.0, megabytes * 1e6 / sum(file.stat().st_size for file in files))
    for file in files:
        credit = 0.0
        for row in _rows(file):
            credit += share
            if credit >= 1.0:
                credit -= 1.0
                yield row["text"] if "text" in row else "\n".join(m["content"] for m in row["messages"])


def build_shards(
    corpus: Path, out: Path, tokenizer: Tokenizer, say: Callable[[str], None] = print
) -> list[ShardInfo]:
    """Encode every source that `out` does not hold yet for this tokenizer."""
    digest = tokenizer_digest(tokenizer)
    index = _read_index(out)
    if index.get("tokenizer") != digest:
        index = {"tokenizer": digest, "sources": {}}
    infos = []
    for file in corpus_files(corpus):
        known = index["sources"].get(file.stem)
        if known is None or known.get("file_bytes") != file.stat().st_size:
            info = _build_one(file, out, tokenizer)
            index["sources"][file.stem] = {**asdict(info), "file_bytes": file.stat().st_size}
            write_atomic(out / INDEX, json.dumps(index, indent=1, ensure_ascii=False) + "\n")
            each = "" if info.chat else f", {info.bytes / max(info.tokens, 1):.2f} bytes each"
            say(f"{file.stem}: {info.tokens:,} tokens{each}")
        else:
            info = ShardInfo(**{k: v for k, v in known.items() if k != "file_bytes"})
        infos.append(info)
    return infos


def open_shards(out: Path, infos: Iterable[ShardInfo], vocab_size: int) -> list[Shard]:
    """Memory-map shards; nothing is read yet."""
    shards = []
    for info in infos:
        tokens = np.memmap(out / f"{info.source}.tokens", dtype=_id_type(vocab_size), mode="r")
        documents = np.load(out / f"{info.source}.documents.npy", allow_pickle=False)
        shards.append(Shard(info, tokens, documents))
    return shards


def encode_row(row: dict[str, Any], tokenizer: Tokenizer) -> tuple[list[int], int]:
    """The ids of a corpus row and how many of them are prompt.

    Every row begins with [gMASK]<sop>. Text ends with <|endoftext|>; a chat row ends with the
    <|user|> that the model itself must write to give the turn back.
    """
    if "text" in row:
        return _text_row(tokenizer.encode(row["text"]), tokenizer), 0
    messages = row["messages"]
    prompt = tokenizer.apply_chat_template(messages[:-1], enable_thinking=False)
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    return [*whole, tokenizer.control_ids[USER]], len(prompt)


def _text_row(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    control = tokenizer.control_ids
    return [control[GMASK], control[SOP], *ids, control[ENDOFTEXT]]


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(tokenizer.backend.to_str().encode("utf-8")).hexdigest()


def _build_one(file: Path, out: Path, tokenizer: Tokenizer) -> ShardInfo:
    documents: list[tuple[int, int, int]] = []
    position = size = 0
    language = licence = ""
    chat = False
    dtype = _id_type(tokenizer.vocab_size)
    with (
        atomic_path(out / f"{file.stem}.tokens") as tokens_path,
        atomic_path(out / f"{file.stem}.documents.npy") as documents_path,
    ):
        with tokens_path.open("wb") as tokens:
            for rows in _batches(_rows(file)):
                for row, (ids, prompt) in zip(rows, _encode_rows(rows, tokenizer), strict=True):
                    language, licence = row.get("language", row.get("task", "")), row.get("licence", "")
                    chat = "messages" in row
                    tokens.write(np.asarray(ids, dtype=dtype).tobytes())
                    documents.append((position, position + len(ids), prompt))
                    position += len(ids)
                    size += len(row["text"].encode()) if not chat else 0
        table = np.asarray(documents, dtype=np.int64).reshape(-1, 3)
        with documents_path.open("wb") as target:
            np.save(target, table, allow_pickle=False)
    return ShardInfo(file.stem, "chat" if chat else language, licence, chat, len(table), position, size)


def _encode_rows(rows: list[dict[str, Any]], tokenizer: Tokenizer) -> Iterator[tuple[list[int], int]]:
    if "text" not in rows[0]:
        yield from (encode_row(row, tokenizer) for row in rows)
        return
    for ids in tokenizer.encode_batch([row["text"] for row in rows]):
        yield _text_row(ids, tokenizer), 0


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise RecipeError(f"{file}: line {number} is not JSON ({error})") from None
            if not isinstance(row, dict) or not ("text" in row or "messages" in row):
                raise RecipeError(f"{file}: line {number} has neither text nor messages")
            yield row


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _id_type(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _read_index(out: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((out / INDEX).read_text("utf-8")))
    except (OSError, ValueError):
        return {}
