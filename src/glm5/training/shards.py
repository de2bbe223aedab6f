"""Token shards: one memory-mapped file of ids a source, with the borders of its documents.

`<source>.tokens` holds uint16 (uint32 for large vocabularies) ids, `<source>.documents.npy` int64
rows (start, end, prompt): the loss falls on ids after `prompt`. `shards.json` keeps language,
licence and counts of each source and the checksum of the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from glm5.disk.files import atomic_path, remove_temporaries, write_atomic
from glm5.errors import TrainingError
from glm5.text.control_tokens import ENDOFTEXT, GMASK, OBSERVATION, SOP, USER
from glm5.text.tokenizer import Tokenizer
from glm5.training.corpus import Corpus, Document

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
    digest: str = ""  # of the source file


@dataclass(frozen=True)
class Shard:
    """An opened shard."""

    info: ShardInfo
    tokens: np.ndarray  # memory-mapped
    documents: np.ndarray  # int64 [documents, 3]


def sample_texts(corpus: Corpus, megabytes: float) -> Iterator[str]:
    """Text for a tokenizer: every source in proportion to its size, documents spread evenly."""
    share = min(1.0, megabytes * 1e6 / max(1, sum(file.stat().st_size for file in corpus.files)))
    for file in corpus.files:
        credit = 0.0
        for document in corpus.documents(file):
            credit += share
            if credit >= 1.0:
                credit -= 1.0
                yield document.text or "\n".join(map(_spoken, document.messages or []))


def _spoken(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return " ".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def build_shards(
    corpus: Corpus, out: Path, tokenizer: Tokenizer, say: Callable[[str], None] = print
) -> list[ShardInfo]:
    """Encode every source that `out` does not hold yet, as it is now, for this tokenizer."""
    remove_temporaries(out)
    digest = tokenizer_digest(tokenizer)
    index = _read_index(out)
    if index.get("tokenizer") != digest:
        index = {"tokenizer": digest, "sources": {}}
    infos = []
    for file in corpus.files:
        content = corpus.digest(file)
        info = _known_shard(index["sources"].get(file.stem), content, out, tokenizer.vocab_size)
        if info is None:
            info = _build_one(corpus, file, out, tokenizer, content)
            index["sources"][file.stem] = asdict(info)
            write_atomic(out / INDEX, json.dumps(index, indent=1, ensure_ascii=False) + "\n")
            each = "" if info.chat else f", {info.bytes / max(info.tokens, 1):.2f} bytes each"
            say(f"{file.stem}: {info.tokens:,} tokens{each}")
        infos.append(info)
    return infos


def _known_shard(known: Any, content: str, out: Path, vocab_size: int) -> ShardInfo | None:
    """The shard that was built of this very file and is still whole; None = build it anew."""
    try:
        info = ShardInfo(**known)
        size = (out / f"{info.source}.tokens").stat().st_size
        table = np.load(out / f"{info.source}.documents.npy", allow_pickle=False, mmap_mode="r")
        whole = size == info.tokens * np.dtype(_id_type(vocab_size)).itemsize
        fits = table.shape == (info.documents, 3) and table.dtype == np.int64
        return info if info.digest == content and whole and fits else None
    except (TypeError, OSError, ValueError):
        return None


def open_shards(out: Path, infos: Iterable[ShardInfo], vocab_size: int) -> list[Shard]:
    """Memory-map shards; nothing is read yet."""
    shards = []
    for info in infos:
        tokens = np.memmap(out / f"{info.source}.tokens", dtype=_id_type(vocab_size), mode="r")
        documents = np.load(out / f"{info.source}.documents.npy", allow_pickle=False)
        shards.append(Shard(info, tokens, documents))
    return shards


def encode_chat(messages: list[dict[str, Any]], tokenizer: Tokenizer) -> tuple[list[int], int]:
    """The ids of a chat and how many of them are prompt; what follows is what the assistant writes.

    Every row begins with [gMASK]<sop> and ends with the token by which the assistant itself gives the turn
    back: <|user|>, or <|observation|> behind a tool call.

    Raises TrainingError when the last message is not the assistant's.
    """
    if not messages or messages[-1].get("role") != "assistant":
        raise TrainingError("a chat's last message must be the assistant's: that is what is learned")
    prompt = tokenizer.apply_chat_template(messages[:-1], enable_thinking=False)
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    last = OBSERVATION if messages[-1].get("tool_calls") else USER
    return [*whole, tokenizer.control_ids[last]], len(prompt)


def encode_row(row: dict[str, Any], tokenizer: Tokenizer) -> tuple[list[int], int]:
    """The ids of a corpus row and how many of them are prompt. Text ends with <|endoftext|>."""
    if "text" in row:
        return _text_row(tokenizer.encode(row["text"]), tokenizer), 0
    return encode_chat(row["messages"], tokenizer)


def _text_row(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    control = tokenizer.control_ids
    return [control[GMASK], control[SOP], *ids, control[ENDOFTEXT]]


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(tokenizer.backend.to_str().encode("utf-8")).hexdigest()


def _build_one(corpus: Corpus, file: Path, out: Path, tokenizer: Tokenizer, content: str) -> ShardInfo:
    table: list[tuple[int, int, int]] = []
    position = size = 0
    languages: Counter[str] = Counter()
    licence, chat = "", False
    dtype = _id_type(tokenizer.vocab_size)
    with (
        atomic_path(out / f"{file.stem}.tokens") as tokens_path,
        atomic_path(out / f"{file.stem}.documents.npy") as documents_path,
    ):
        with tokens_path.open("wb") as tokens:
            for some in _batches(corpus.documents(file)):
                for document, (ids, prompt) in zip(some, _encode(some, tokenizer), strict=True):
                    languages[document.language] += 1
                    licence, chat = document.licence, document.is_chat
                    tokens.write(np.asarray(ids, dtype=dtype).tobytes())
                    table.append((position, position + len(ids), prompt))
                    position += len(ids)
                    size += len((document.text or "").encode())
        with documents_path.open("wb") as target:
            np.save(target, np.asarray(table, dtype=np.int64).reshape(-1, 3), allow_pickle=False)
    language = "chat" if chat else languages.most_common(1)[0][0] if languages else ""
    return ShardInfo(file.stem, language, licence, chat, len(table), position, size, content)


def _encode(documents: list[Document], tokenizer: Tokenizer) -> Iterator[tuple[list[int], int]]:
    texts = [document.text for document in documents if document.text is not None]
    if len(texts) == len(documents):
        for ids in tokenizer.encode_batch(texts):
            yield _text_row(ids, tokenizer), 0
        return
    for document in documents:
        yield encode_chat(document.messages or [], tokenizer)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    while batch := list(islice(documents, _BATCH)):
        yield batch


def _id_type(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _read_index(out: Path) -> dict[str, Any]:
    try:
        found = dict(json.loads((out / INDEX).read_text("utf-8")))
        return found if isinstance(found.get("sources"), dict) else {}
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
