"""The documents of a corpus, through one guarded reader: JSON lines, or one's own text files.

A corpus is a directory. `*.jsonl` hold a row a line, `{"text": ..., "language": ...}` or
`{"messages": [...]}`; `*.txt` are cut into documents at blank lines. What is held out lies in `heldout/`;
without that folder every fiftieth document is held out and never trained on. Every fault is a line with the
file and the line's number.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from glm5.errors import TemplateError, TrainingError
from glm5.text.chat.messages import check_messages

SHIPPED = "shipped"  # the corpus of this name comes with the package
MAX_LINE = 256 << 20
_EVERY = 50  # documents of which one is held out
_LEAST_TEXT = 1200  # characters of a document made from a text file, where it has so many


@dataclass(frozen=True)
class Document:
    """A text, or a chat whose last message is the assistant's."""

    text: str | None
    messages: list[dict[str, Any]] | None
    language: str
    licence: str

    @property
    def is_chat(self) -> bool:
        return self.messages is not None


class Corpus:
    """The documents of a directory by source; a source is a file.

    Raises TrainingError for what cannot be used, when it is read.
    """

    def __init__(self, directory: Path) -> None:
        if str(directory) == SHIPPED and not directory.exists():
            directory = Path(str(resources.files("glm5.text").joinpath("samples")))
        self.directory = directory
        self.files = _files(directory)
        if not self.files:
            raise TrainingError(
                f"{directory}: holds no .txt or .jsonl files; put your own text there, or in a checkout run "
                f"`python -m recipes.nano.build {directory}`"
            )
        self._has_heldout = (directory / "heldout").is_dir()
        self._digests: dict[Path, str] = {}

    def digest(self, file: Path) -> str:
        """What a source teaches, as a short name: its bytes, and how documents are held out of them."""
        if file not in self._digests:
            digest = hashlib.blake2b(digest_size=16)
            with file.open("rb") as content:
                while block := content.read(1 << 20):
                    digest.update(block)
            rule = "" if self._has_heldout else f"-without-1-in-{_EVERY}"
            self._digests[file] = digest.hexdigest() + rule
        return self._digests[file]

    @property
    def fingerprint(self) -> str:
        """Of all sources together."""
        return " ".join(f"{file.stem}={self.digest(file)}" for file in self.files)

    def documents(self, file: Path) -> Iterator[Document]:
        """What a source teaches."""
        if self._has_heldout:
            yield from read(file)
        else:
            yield from (document for held, document in _split(file) if not held)

    def heldout(self) -> dict[str, list[str]]:
        """Held-out texts by language.

        Raises TrainingError when there are none, or a row of `heldout/` is no text.
        """
        texts: dict[str, list[str]] = {}
        if self._has_heldout:
            for file in _files(self.directory / "heldout"):
                for number, document in enumerate(read(file), start=1):
                    if document.text is None or not document.language:
                        raise TrainingError(f"{file}: line {number} needs a text and its language")
                    texts.setdefault(document.language, []).append(document.text)
        else:
            for file in self.files:
                for held, document in _split(file):
                    if held and document.text is not None:
                        texts.setdefault(document.language or "text", []).append(document.text)
        if not texts and self._has_heldout:
            raise TrainingError(f"{self.directory / 'heldout'}: holds no text; fill it or delete it")
        if not texts:
            raise TrainingError(
                f"{self.directory}: holds no text to hold out; give at least two texts, or some in heldout/"
            )
        return texts


def read(file: Path) -> Iterator[Document]:
    """Every document of a file. A file's documents are all texts, or all chats."""
    chats: bool | None = None
    number = 0
    for number, document in _numbered(file):
        if chats is None:
            chats = document.is_chat
        elif chats != document.is_chat:
            kinds = ("texts", "a chat") if document.is_chat else ("chats", "a text")
            raise TrainingError(
                f"{file}: line {number} is {kinds[1]} among {kinds[0]}; give each kind a file"
            )
        yield document
    if chats is None:
        raise TrainingError(f"{file}: holds no documents; delete it or fill it")


def language_of(text: str) -> str:
    """`zh` where Han characters lead, else `en`: what a text file says by itself."""
    letters = Counter("zh" if "\u4e00" <= c <= "\u9fff" else "en" for c in text[:20_000] if c.isalpha())
    return "zh" if letters["zh"] * 3 > letters["en"] else "en"


def _files(directory: Path) -> list[Path]:
    """The sources of a directory in a fixed order."""
    try:
        found = [
            p for p in directory.iterdir() if p.suffix in (".jsonl", ".txt") and not p.name.startswith(".")
        ]
    except OSError as error:
        raise TrainingError(
            f"{directory}: cannot be read ({error.strerror}); name the folder of your corpus with "
            "--set data.corpus=DIR, or make the one of nano: python -m recipes.nano.build data/corpus"
        ) from None
    stems = Counter(path.stem for path in found)
    twice = next((stem for stem, count in stems.items() if count > 1), None)
    if twice is not None:
        raise TrainingError(f"{directory}: has two sources named {twice!r}; rename one of the files")
    irregular = next((path for path in found if not path.is_file()), None)
    if irregular is not None:
        raise TrainingError(f"{irregular}: is not a regular file")
    return sorted(found)


def _split(file: Path) -> Iterator[tuple[bool, Document]]:
    """(held out, document): every fiftieth, and the last of a file with fewer; never a file's only one."""
    before: Document | None = None
    count = 0
    for document in read(file):
        if before is not None:
            yield count % _EVERY == 0, before
        before, count = document, count + 1
    assert before is not None
    yield 1 < count < _EVERY or (count > 1 and count % _EVERY == 0), before


def _numbered(file: Path) -> Iterator[tuple[int, Document]]:
    try:
        with file.open("rb") as lines:
            yield from _text_documents(file, lines) if file.suffix == ".txt" else _rows(file, lines)
    except OSError as error:
        raise TrainingError(f"{file}: cannot be read ({error.strerror})") from None


def _rows(file: Path, lines: Any) -> Iterator[tuple[int, Document]]:
    number = 0
    while line := lines.readline(MAX_LINE + 1):
        number += 1
        where = f"{file}: line {number}"
        if len(line) > MAX_LINE:
            raise TrainingError(f"{where} is longer than {MAX_LINE >> 20} MiB")
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise TrainingError(f"{where} is not UTF-8 at byte {error.start}") from None
        except (ValueError, RecursionError) as error:
            raise TrainingError(f"{where} is not JSON ({error})") from None
        if b"\\ud" in line.lower():  # as an escape, the only way into JSON
            _refuse_surrogates(row, where)
        yield number, _document(row, where)


def _refuse_surrogates(row: Any, where: str) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise TrainingError(f"{where} has a lone surrogate, which is no text") from None


def _document(row: Any, where: str) -> Document:
    if not isinstance(row, dict) or not ("text" in row or "messages" in row):
        raise TrainingError(f"{where} has neither text nor messages")
    language = _word(row, "language" if "language" in row else "task", where)
    licence = _word(row, "licence", where)
    if "text" in row:
        text = row["text"]
        if not isinstance(text, str) or not text:
            raise TrainingError(f"{where}: text is {text!r:.60}, not a string of at least one character")
        return Document(text, None, language, licence)
    messages = row["messages"]
    try:
        turns = check_messages(messages)
    except TemplateError as error:
        raise TrainingError(f"{where}: {error}") from None
    if len(turns) < 2:
        raise TrainingError(f"{where}: needs at least two messages, a question and the answer")
    if turns[-1].role != "assistant":
        raise TrainingError(f"{where}: its last message must be the assistant's: that is what is learned")
    return Document(None, messages, language, licence)


def _word(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key, "")
    if not isinstance(value, str):
        raise TrainingError(f"{where}: {key} is {value!r:.60}, not a string")
    return value


def _text_documents(file: Path, lines: Any) -> Iterator[tuple[int, Document]]:
    """A text file cut at blank lines, small pieces joined."""
    pieces: list[str] = []
    start = number = 0
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise TrainingError(
                f"{file}: line {number} is not UTF-8 at byte {error.start}; convert the file first"
            ) from None
        if not text.strip() and sum(map(len, pieces)) >= _LEAST_TEXT:
            yield start, _text_document(pieces)
            pieces = []
        if pieces or text.strip():
            start = start if pieces else number
            pieces.append(text)
    if any(piece.strip() for piece in pieces):
        yield start, _text_document(pieces)


def _text_document(pieces: list[str]) -> Document:
    text = "".join(pieces).strip()
    return Document(text, None, language_of(text), "")
