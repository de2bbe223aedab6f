"""Reads unpacked packages as documents: one extractor a kind of source, all yielding plain text.

Documents come in an order drawn from the hash of their name, so that a size cap keeps a fair
sample. Normalizing, deduplicating and capping is done once for all in `documents`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sqlite3
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from recipes.nano.markup import (
    LineDedupe,
    chunks,
    han_ratio,
    html_to_text,
    normalize,
    roff_to_text,
)
from recipes.nano.sources import CorpusError, Source

HELDOUT_MODULUS = 100
# What is left of a page that mostly repeats another is only its code.
MIN_NEW_SHARE = 0.5
# Below this a "Chinese" page is an untranslated one.
MIN_HAN_RATIO = 0.2
# One file of code that fills a tenth of a small corpus teaches only itself.
MAX_CODE_BYTES = 150_000

_CEDICT_LINE = re.compile(r"(\S+) (\S+) \[([^\]]+)\] /(.+)/")
_TONES = {"a": "āáǎà", "e": "ēéěè", "i": "īíǐì", "o": "ōóǒò", "u": "ūúǔù", "ü": "ǖǘǚǜ"}
_QUOTES = {"「": "“", "」": "”", "『": "‘", "』": "’", "﹁": "“", "﹂": "”"}
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def documents(source: Source, root: Path, simplified: dict[int, str] | None = None) -> Iterator[str]:
    """The documents of one source, ready for training, up to its cap."""
    extractor = EXTRACTORS[source.extractor]
    budget = int(source.cap_mb * 1_000_000)
    dedupe = LineDedupe()
    seen: set[bytes] = set()
    found = 0
    for raw in extractor(root):
        text = raw.translate(simplified) if source.simplify and simplified else raw
        text = normalize(text, 2 if source.language == "code" else 1)
        if source.prose:
            whole, text = text, normalize(dedupe(text))
            if len(text) < MIN_NEW_SHARE * len(whole):
                continue
        data = text.encode("utf-8", "replace")
        if len(data) < source.min_bytes:
            continue
        if source.language == "zh" and han_ratio(text) < MIN_HAN_RATIO:
            continue
        digest = hashlib.sha256(data).digest()
        if digest in seen:
            continue
        seen.add(digest)
        if found and found + len(data) > budget:
            return
        found += len(data)
        yield text
    if not found:
        raise CorpusError(
            f"{source.name}: no text found under {root}; the package's layout has changed, "
            "pin another version"
        )


def is_heldout(text: str) -> bool:
    """Whether a document belongs to the held-out hundredth: a property of its text alone."""
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    return int(digest, 16) % HELDOUT_MODULUS == 0


# ---------------------------------------------------------------- shared steps


def _hash_order(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8")).hexdigest()


def _files(root: Path, pattern: str) -> list[Path]:
    found = [path for path in root.glob(pattern) if path.is_file()]
    return sorted(found, key=lambda path: _hash_order(path.relative_to(root).as_posix()))


def _only(root: Path, pattern: str) -> Path:
    found = sorted(root.glob(pattern))
    if not found:
        raise CorpusError(f"{root.name}: no {pattern} in it; pin another version of the package")
    return found[0]


def _read(path: Path) -> str:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return data.decode("utf-8", "replace")


def _sampled(texts: Iterable[str]) -> list[str]:
    return sorted(texts, key=_hash_order)


def _html(root: Path, pattern: str, leave_out: tuple[str, ...] = ()) -> Iterator[str]:
    for path in _files(root, pattern):
        name = path.relative_to(root).as_posix()
        if not any(part in name for part in leave_out):
            yield html_to_text(_read(path))


def _manpages(root: Path, pattern: str) -> Iterator[str]:
    for path in _files(root, pattern):
        yield roff_to_text(_read(path))


def _fortunes(path: Path) -> list[str]:
    return [_ANSI.sub("", text) for text in re.split(r"\n%+\n", _read(path))]


# ---------------------------------------------------------------- English prose


def linux_doc_en(root: Path) -> Iterator[str]:
    leave_out = ("/translations/", "/_static/", "/_sources/", "genindex", "search.html")
    return _html(root, "usr/share/doc/linux-doc-*/html/**/*.html", leave_out)


def anarchism(root: Path) -> Iterator[str]:
    # ...con.html are tables of contents.
    return _html(root, "usr/share/doc/anarchism/html/*.html", ("con.html", "index.html"))


def wordnet(root: Path) -> list[str]:
    found: list[str] = []
    for part in ("noun", "verb", "adj", "adv"):
        lines = _read(_only(root, f"usr/share/wordnet/data.{part}")).splitlines()
        found += chunks(filter(None, map(wordnet_entry, lines)))
    return _sampled(found)


def wordnet_entry(line: str) -> str:
    """`00004258 03 n 02 living_thing 0 animate_thing 0 ... | gloss` as `words: gloss`."""
    if line.startswith("  "):
        return ""  # the licence at the top of each file
    fields, _, gloss = line.partition(" | ")
    parts = fields.split()
    words = parts[4 : 4 + 2 * int(parts[3], 16) : 2]
    names = (re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words)
    return f"{', '.join(names)}: {gloss.strip()}"


def python_doc(root: Path) -> Iterator[str]:
    leave_out = ("genindex", "search.html", "_sources/", "_static/", "py-modindex", "contents.html")
    return _html(root, "usr/share/doc/python3.*[0-9]/html/**/*.html", leave_out)


def wiki_leads(root: Path) -> list[str]:
    summaries = json.loads(_read(_only(root, "*/data/summaries_en-us.json")))
    return _sampled(f"{row['title']}\n\n{row['extract']}" for row in summaries.values())


def manpages_en(root: Path) -> Iterator[str]:
    return _manpages(root, "usr/share/man/man*/*.gz")


def libreoffice_help(root: Path) -> Iterator[str]:
    return _html(root, "usr/share/libreoffice/help/*/text/**/*.html")


def fortunes_en(root: Path) -> list[str]:
    folder = _only(root, "usr/share/games/fortunes")
    names = sorted(path for path in folder.iterdir() if path.is_file() and not path.suffix)
    # Line art is no prose.
    paths = [path for path in names if path.name not in ("art", "ascii-art")]
    return _sampled(text for path in paths for text in _fortunes(path))


def debian_handbook_en(root: Path) -> Iterator[str]:
    return _html(root, "usr/share/doc/debian-handbook/html/en-US/*.html", ("index", "ix01"))


# ---------------------------------------------------------------- Chinese


def china_law(root: Path) -> list[str]:
    """One document a chapter of a law in force: title, chapter, articles."""
    chapters: dict[tuple[str, str], list[str]] = defaultdict(list)
    database = _only(root, "*/data/laws.db").resolve().as_uri()
    with closing(sqlite3.connect(f"{database}?mode=ro", uri=True)) as laws:
        rows = laws.execute(
            "SELECT law_name, chapter, article_no, article_text FROM articles "
            "WHERE status = '现行有效' ORDER BY id"  # superseded texts repeat those in force
        )
        for law, chapter, number, text in rows:
            chapters[law, chapter or ""].append(f"{number or ''} {text}".strip())
    return _sampled(
        "\n".join(filter(None, [law, chapter, *articles])) for (law, chapter), articles in chapters.items()
    )


def manpages_zh(root: Path) -> Iterator[str]:
    return _manpages(root, "usr/share/man/zh_CN/man*/*.gz")


def debian_handbook_zh(root: Path) -> Iterator[str]:
    return _html(root, "usr/share/doc/debian-handbook/html/zh-CN/*.html", ("index", "ix01"))


def debian_reference(root: Path) -> Iterator[str]:
    return _html(root, "usr/share/debian-reference/*.zh-cn.html", ("index",))


def linux_doc_zh(root: Path) -> Iterator[str]:
    return _html(root, "usr/share/doc/linux-doc-*/html/translations/zh_CN/**/*.html")


def fortunes_zh(root: Path) -> list[str]:
    texts = _fortunes(_only(root, "usr/share/games/fortunes/chinese"))
    texts += _fortunes(_only(root, "usr/share/games/fortunes/song100"))
    return _sampled(text for text in texts if "─" not in text)


def tang300(root: Path) -> list[str]:
    """`《title》author`, a line break, then the poem."""
    return _sampled(map(_tang_poem, _fortunes(_only(root, "usr/share/games/fortunes/tang300"))))


def _tang_poem(text: str) -> str:
    title, _, rest = text.strip().partition("\n")
    author, _, body = rest.partition("\n")
    # The anthology's short title for the best known poem of all is not the usual one.
    title = {"《夜思》": "《静夜思》"}.get(title.strip(), title.strip())
    return f"{title}{author.strip().removeprefix('作者：')}\n{body.strip()}"


_CLASSICS = (
    "mengxue",
    "lunyu",
    "sishuwujing",
    "shijing",
    "chuci",
    "caocaoshiji",
    "nalanxingde",
    "shuimotangshi",
    "wudaishici",
    "youmengying",
)


def chinese_classics(root: Path) -> list[str]:
    found: list[str] = []
    for folder in _CLASSICS:
        for path in sorted(root.glob(f"package/dist/{folder}/**/*.json")):
            found += _passages(json.loads(_read(path)))
    return _sampled(found)


def song_ci(root: Path) -> list[str]:
    return _poems(root, "songci/ci.song.*.json")


def tang_poems(root: Path) -> list[str]:
    return _poems(root, "quantangshi/poet.tang.*.json")


def _poems(root: Path, pattern: str) -> list[str]:
    paths = sorted(root.glob(f"package/dist/{pattern}"))
    return _sampled(text for path in paths for text in _passages(json.loads(_read(path))))


def _passages(node: Any) -> Iterator[str]:
    """The passages in a tree of objects: the leaf lists of lines, under the names beside them."""
    if isinstance(node, list):
        for item in node:
            yield from _passages(item)
        return
    if not isinstance(node, dict):
        return
    lines = node.get("paragraphs") or node.get("para") or node.get("content") or []
    if isinstance(lines, list) and lines and all(isinstance(line, str) for line in lines):
        title = node.get("title") or node.get("rhythmic") or node.get("chapter") or ""
        author = (node.get("author") or "").strip()
        heading = [f"《{title}》{author}"] if title else []
        yield "\n".join([*heading, *lines, node.get("prologue") or ""])
    elif isinstance(lines, str):
        yield "\n".join([lines, *node.get("comment", [])])
    else:
        yield from _passages(lines)


# ---------------------------------------------------------------- pairs


def cc_cedict(root: Path) -> list[str]:
    """Dictionary lines, `水 (shuǐ) water; river; liquid`; no surnames, no long words."""
    entries: dict[tuple[str, str], list[str]] = {}
    for _, word, pinyin, senses in _cedict_rows(root):
        kept = [tidy_sense(sense) for sense in senses.split("/")]
        kept = [sense for sense in kept if sense]
        if kept and len(word) <= 4:
            entries.setdefault((word, tone_marks(pinyin)), []).extend(kept)
    by_length: dict[int, list[str]] = defaultdict(list)
    for (word, pinyin), meanings in entries.items():
        line = f"{word} ({pinyin}) {'; '.join(dict.fromkeys(meanings))}"
        by_length[max(2, len(word))].append(line)
    # A cap should cut the long words, which are the rare ones.
    return [text for _, lines in sorted(by_length.items()) for text in _sampled(chunks(lines))]


def simplified_table(root: Path) -> dict[int, str]:
    """Traditional to simplified characters, each to the one the dictionary pairs it with most."""
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for traditional, simple, _, _ in _cedict_rows(root):
        if len(traditional) == len(simple):
            for old, new in zip(traditional, simple, strict=True):
                votes[old][new] += 1
    table = {old: counts.most_common(1)[0][0] for old, counts in votes.items()}
    table.update(_QUOTES)
    return {ord(old): new for old, new in table.items() if old != new and len(old) == 1}


def _cedict_rows(root: Path) -> Iterator[tuple[str, str, str, str]]:
    for line in _read(_only(root, "*/data/cedict*.txt.gz")).splitlines():
        match = _CEDICT_LINE.fullmatch(line.strip())
        if match and not line.startswith("#"):
            yield match[1], match[2], match[3], match[4]


def tidy_sense(sense: str) -> str:
    """A sense without measure words and cross-reference brackets; "" for what is no sense."""
    if re.match(r"CL:|surname |(old |Japanese |erhua )?variant of|see (also )?[^a-z]", sense):
        return ""
    sense = re.sub(r"\[[^\]]*\]", "", sense)
    return re.sub(r"([^\x00-\x7f]+)\|([^\x00-\x7f]+)", r"\2", sense).strip()


def tone_marks(pinyin: str) -> str:
    """`xue2 xi2` as `xuéxí`; the fifth tone has no mark."""
    return "".join(map(_tone_mark, pinyin.replace("u:", "ü").replace("U:", "Ü").split()))


def _tone_mark(syllable: str) -> str:
    if not syllable[-1:].isdigit():
        return syllable
    body, tone = syllable[:-1], int(syllable[-1])
    if tone not in (1, 2, 3, 4):
        return body
    lower = body.lower()
    # a and e take the mark, then the o of ou, else the last vowel.
    vowel = next((char for char in "ae" if char in lower), "o" if "ou" in lower else "")
    place = lower.index(vowel) if vowel else max(map(lower.rfind, "iouü"))
    if place < 0:
        return body
    marked = _TONES[lower[place]][tone - 1]
    marked = marked.upper() if body[place].isupper() else marked
    return body[:place] + marked + body[place + 1 :]


def libreoffice_l10n(root: Path) -> list[str]:
    found: list[str] = []
    for path in _files(root, "usr/lib/libreoffice/program/resource/zh_CN/LC_MESSAGES/*.mo"):
        pairs = (f"{english}\n{chinese}" for english, chinese in mo_pairs(path.read_bytes()))
        found += chunks(dict.fromkeys(pairs), 1500, "\n\n")
    return _sampled(found)


def mo_pairs(data: bytes) -> Iterator[tuple[str, str]]:
    """The translated messages of a GNU .mo file, without contexts and keyboard marks."""
    magic = struct.unpack_from("<I", data)[0]
    order = "<" if magic == 0x950412DE else ">"
    count, originals, translations = struct.unpack_from(f"{order}3I", data, 8)
    for index in range(count):
        texts: list[str] = []
        for table in (originals, translations):
            length, offset = struct.unpack_from(f"{order}2I", data, table + 8 * index)
            texts.append(data[offset : offset + length].split(b"\0")[0].decode("utf-8", "replace"))
        english, chinese = (_plain_message(text.rpartition("\x04")[2]) for text in texts)
        if english and english != chinese and han_ratio(chinese) > 0:
            yield english, chinese


def _plain_message(text: str) -> str:
    text = re.sub(r"\([~_&]\w\)", "", text)
    return re.sub(r"(?<![\w])[~_](?=\w)|(?<=\w)[~_](?=[a-z])", "", text).strip()


# ---------------------------------------------------------------- code

_NOT_CODE = re.compile(
    r"(^|/)(tests?|testing|idle_test|site-packages|dist-packages|__pycache__|turtledemo|ensurepip)/"
    r"|(^|/)test_[^/]*\.py$|^encodings/(cp|mac_|iso|koi|utf_|big|gb)|pydoc_data/topics"
    r"|(^|/)(lextab|yacctab|_sysconfigdata_)[^/]*$|_parser\.py$"
)


def python_stdlib(root: Path) -> Iterator[str]:
    return _code(root)


def python_wheel(root: Path) -> Iterator[str]:
    return _code(root)


def _code(root: Path) -> Iterator[str]:
    for path in _files(root, "**/*.py"):
        if _NOT_CODE.search(path.relative_to(root).as_posix()):
            continue
        if path.stat().st_size <= MAX_CODE_BYTES:
            yield _read(path)


EXTRACTORS: dict[str, Callable[[Path], Iterable[str]]] = {
    function.__name__: function
    for function in (
        linux_doc_en, anarchism, wordnet, python_doc, wiki_leads, manpages_en, libreoffice_help,
        fortunes_en, debian_handbook_en, china_law, manpages_zh, debian_handbook_zh,
        debian_reference, linux_doc_zh, fortunes_zh, tang300, chinese_classics, song_ci,
        tang_poems, cc_cedict, libreoffice_l10n, python_stdlib, python_wheel,
    )
}  # fmt: skip
