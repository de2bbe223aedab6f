"""Chat-form supervised rows made of the extracted corpora: dictionary, builtins, poems, greetings.

Each question has one answer, the same in every phrasing, so that a small model can learn it.
Reads only the training split of the corpora.
"""

from __future__ import annotations

import builtins
import importlib
import inspect
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from glm5.disk.files import atomic_path
from recipes.nano.sources import SOURCES, CorpusError
from recipes.nano.wordlists import (
    CORE_WORDS,
    DOC_SENTENCES,
    LIBRARY,
    SMALL_TALK,
)

# (question, answer)
CHINESE_WORD = [
    ("What is {zh} in English?", "{zh} ({pinyin}) means {en}."),
    ("What does {zh} mean?", "{zh} ({pinyin}) means {en}."),
    ("“{zh}”用英语怎么说？", "“{zh}”的英语是 {en}。"),
    ("{zh}是什么意思？", "“{zh}”的英语是 {en}。"),
]
ENGLISH_WORD = [
    ("How do you say {en} in Chinese?", "“{en}” in Chinese is {zh} ({pinyin})."),
    ("What is {en} in Chinese?", "“{en}” in Chinese is {zh} ({pinyin})."),
    ("{en} 的中文是什么？", "“{en}”的中文是 {zh}（{pinyin}）。"),
    ("“{en}”用中文怎么说？", "“{en}”的中文是 {zh}（{pinyin}）。"),
]
BUILTIN = [
    ("What does the Python {kind} {name} do?", "{text}"),
    ("What is {name} in Python?", "{text}"),
    ("{name}{call}", "{text}"),
    ("Python 的 {name} 是做什么的？", "{name}：{text}"),
    ("Python 里的 {name} 有什么用？", "{name}：{text}"),
]
POEM_BY_LINE = [
    "{first}",
    "请接下去：{first}，",
    "“{first}”的下一句是什么？",
    "背诵以“{first}”开头的诗",
]
POEM_BY_TITLE = ["背诵《{title}》", "请背诵唐诗《{title}》"]
POEM_BY_AUTHOR = ["背诵{author}的《{title}》", "{author}的《{title}》"]

WORDS = 4000
MAX_WORD_CHARS = 4
MAX_SENSES = 3
MAX_GLOSS_CHARS = 36
MAX_ANSWER_CHARS = 160
MAX_POEM_CHARS = 120
# An English word is answered by the Chinese word that has it early among its senses.
SENSE_WEIGHT = (1.0, 0.3, 0.1)
# Rarer English words in this much prose are ones that nobody would ask for.
MIN_ENGLISH_COUNT = 10
NEEDED = ("cc-cedict", "tang300", "wiki-leads", "fortunes")
ENGLISH_PROSE = ("wiki-leads", "fortunes")

_ENTRY = re.compile(r"([\u3400-\u9fff]{1,4}) \(([^)]+)\) (.+)")
_HAN_RUN = re.compile(r"[\u3400-\u9fff]+")
_NO_GLOSS = re.compile(
    r"(used |abbr|see |variant|classifier|particle|prefix|suffix|also |Taiwan|fig\.|lit\.|surname|"
    r"radical|erhua|Kangxi|Japanese|interjection|onom|euph|old |indicat|same as|name of|archaic|"
    r"component|place name|modal|emphatic|transliteration|cf |e\.g|pr\. |from |in |\W)"
)
_ASKABLE = re.compile(r"[A-Za-z][A-Za-z'-]*( [A-Za-z'-]+){0,2}")
_POEM = re.compile(r"《([^》]+)》(.*)\n((?:.|\n)+)")
_SIGNATURE = re.compile(r"[\w.]+\(.*\)(?:\s*-+>\s*(?:None\.)?\s*(.*))?$")
_SENTENCE_END = re.compile(r"(?<=[.!?])(?:\s{2,}|\s+(?=[A-Z]))")
# Classes that everybody calls functions.
_FUNCTION_MODULES = ("itertools", "functools", "operator")


class Entry(NamedTuple):
    """What the dictionary says of a word."""

    pinyin: str
    senses: list[str]


def build_tasks(corpus_dir: Path, out_dir: Path, seed: int) -> dict[str, int]:
    """Write `tasks-<task>.jsonl` for every task; returns the number of rows of each."""
    missing = missing_sources(corpus_dir)
    if missing:
        raise CorpusError(f"{corpus_dir}: no {missing[0]}.jsonl; build the corpora first")
    licence = {source.name: source.licence for source in SOURCES}
    tasks = {
        "dictionary": (dictionary_pairs(corpus_dir), "cc-cedict", licence["cc-cedict"]),
        "builtin": (builtin_pairs(), "python-stdlib", licence["python-stdlib"]),
        "poem": (poem_pairs(_texts(corpus_dir, "tang300")), "tang300", licence["tang300"]),
        "greeting": (greeting_pairs(), "glm5", "Apache-2.0"),
    }
    counts = {}
    for task, (pairs, source, terms) in tasks.items():
        rows = [_row(question, answer, task, source, terms) for question, answer in pairs]
        random.Random(f"{seed}-{task}").shuffle(rows)
        with (
            atomic_path(out_dir / f"tasks-{task}.jsonl") as temporary,
            temporary.open("w", encoding="utf-8") as file,
        ):
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        counts[task] = len(rows)
    return counts


def missing_sources(corpus_dir: Path) -> list[str]:
    """The sources that the tasks need and that are not built yet."""
    return [name for name in NEEDED if not _corpus(corpus_dir, name).exists()]


def _row(question: str, answer: str, task: str, source: str, licence: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ],
        "task": task,
        "source": source,
        "licence": licence,
    }


def _corpus(corpus_dir: Path, name: str) -> Path:
    return corpus_dir / f"{name}.jsonl"


def _texts(corpus_dir: Path, name: str) -> Iterator[str]:
    with _corpus(corpus_dir, name).open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


# ---------------------------------------------------------------- dictionary


def dictionary_pairs(corpus_dir: Path) -> Iterator[tuple[str, str]]:
    """Questions in both directions about the most common words."""
    entries = read_entries(_texts(corpus_dir, "cc-cedict"))
    chinese = (source.name for source in SOURCES if source.language == "zh")
    frequency = word_frequency(
        (_texts(corpus_dir, name) for name in chinese if _corpus(corpus_dir, name).exists()),
        set(entries),
    )
    ranked = sorted(entries, key=lambda word: (-frequency.get(word, 0.0), word))[:WORDS]
    words = dict.fromkeys([word for word in CORE_WORDS if word in entries] + ranked)
    english = _english_counts(corpus_dir)
    askable = {word for word, count in english.items() if count >= MIN_ENGLISH_COUNT}
    askable.update(" ".join(CORE_WORDS.values()).lower().split())
    askable.discard("or")  # "handle or shaft" is an explanation
    yield from phrase_dictionary({word: entries[word] for word in words}, frequency, askable)


def phrase_dictionary(
    entries: Mapping[str, Entry], frequency: Mapping[str, float], askable: set[str]
) -> Iterator[tuple[str, str]]:
    """The rows of these entries, Chinese to English, then English to Chinese."""
    for word, (pinyin, senses) in entries.items():
        slots = {"zh": word, "pinyin": pinyin, "en": "; ".join(senses)}
        yield from _fill(CHINESE_WORD, slots)
    for english, word in best_words(entries, frequency, askable).items():
        yield from _fill(ENGLISH_WORD, {"zh": word, "pinyin": entries[word].pinyin, "en": english})


def best_words(
    entries: Mapping[str, Entry], frequency: Mapping[str, float], askable: set[str]
) -> dict[str, str]:
    """One Chinese word for each common English sense: an everyday one, else the most frequent."""
    best: dict[str, tuple[tuple[bool, float, str], str]] = {}
    for word, (_, senses) in entries.items():
        for place, sense in enumerate(senses):
            english = _bare(sense)
            if not _ASKABLE.fullmatch(english) or not askable.issuperset(english.lower().split()):
                continue
            # A word with many meanings is a worse answer than one that means just this.
            weight = SENSE_WEIGHT[min(place, len(SENSE_WEIGHT) - 1)] / len(senses)
            is_core = CORE_WORDS.get(word) == english
            score = (is_core, weight * frequency.get(word, 0.0), word)
            if english not in best or score > best[english][0]:
                best[english] = (score, word)
    return {english: word for english, (_, word) in best.items()}


def read_entries(texts: Iterable[str]) -> dict[str, Entry]:
    """The entries of dictionary lines; of several readings the everyday or the richest one."""
    entries: dict[str, Entry] = {}
    ranks: dict[str, tuple[bool, bool, int]] = {}
    for line in (line for text in texts for line in text.split("\n")):
        match = _ENTRY.fullmatch(line)
        if not match:
            continue
        word, pinyin, definition = match.groups()
        parts = [part.strip() for part in definition.split(";")]
        core = CORE_WORDS.get(word, "")
        meant = next((part for part in parts if core and _bare(part) == core), "")
        senses = short_senses(definition, meant or core)
        rank = (bool(meant), pinyin == pinyin.lower(), len(parts))
        if senses and rank > ranks.get(word, (False, False, 0)):
            entries[word], ranks[word] = Entry(pinyin, senses), rank
    return entries


def _bare(sense: str) -> str:
    return re.sub(r"^(to|a|an|the) ", "", sense)


def short_senses(definition: str, first: str = "") -> list[str]:
    """The first plain senses of a dictionary line, few and short enough to be remembered."""
    plain = definition
    while plain != (plain := re.sub(r"\([^()]*\)", "", plain)):
        pass
    kept = [first] if first else []
    for raw in plain.split(";"):
        sense = " ".join(raw.replace(" sb", " somebody").replace(" sth", " something").split())
        sense = sense.strip(" ,.:")
        if not sense.isascii() or not sense or _NO_GLOSS.match(sense) or sense in kept:
            continue
        if len(kept) == MAX_SENSES or len("; ".join([*kept, sense])) > MAX_GLOSS_CHARS:
            break
        kept.append(sense)
    return kept


def word_frequency(sources: Iterable[Iterable[str]], vocabulary: set[str]) -> dict[str, float]:
    """How common each word is by longest match; every source has one vote, whatever its size."""
    total: dict[str, float] = defaultdict(float)
    for texts in sources:
        counts: Counter[str] = Counter()
        for text in texts:
            for run in _HAN_RUN.findall(text):
                counts.update(longest_match(run, vocabulary))
        size = sum(counts.values()) or 1
        for word, count in counts.items():
            total[word] += count / size
    return total


def _english_counts(corpus_dir: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    for name in ENGLISH_PROSE:
        for text in _texts(corpus_dir, name):
            counts.update(re.findall(r"[a-z'-]+", text.lower()))
    return counts


def longest_match(run: str, vocabulary: set[str]) -> Iterator[str]:
    """The words of a run of Chinese characters, always the longest known one first."""
    start = 0
    while start < len(run):
        for length in range(min(MAX_WORD_CHARS, len(run) - start), 0, -1):
            word = run[start : start + length]
            if length == 1 or word in vocabulary:
                break
        if word in vocabulary:
            yield word
        start += length


def _fill(templates: list[tuple[str, str]], slots: dict[str, str]) -> Iterator[tuple[str, str]]:
    for question, answer in templates:
        yield question.format(**slots), answer.format(**slots)


# ---------------------------------------------------------------- Python builtins


def builtin_pairs() -> Iterator[tuple[str, str]]:
    """Questions about what Python has, answered by the first sentence of its docstring."""
    for name, thing in _python_names():
        text = DOC_SENTENCES.get(name) or first_sentence(inspect.getdoc(thing) or "")
        if not text:
            continue
        kind = _kind(name, thing)
        call = "" if kind in ("exception", "class", "type") else "()"
        slots = {"name": name, "kind": kind, "call": call, "text": text}
        yield from _fill(BUILTIN, slots)


def _python_names() -> Iterator[tuple[str, Any]]:
    for name in sorted(vars(builtins)):
        thing = getattr(builtins, name)
        # exit, quit and the like belong to the interactive prompt.
        if not name.startswith("_") and callable(thing) and _is_builtin(thing):
            yield name, thing
    for owner in (str, list, dict, set, tuple, int, float, bytes):
        for name in sorted(vars(owner)):
            thing = getattr(owner, name)
            if not name.startswith("_") and callable(thing):
                yield f"{owner.__name__}.{name}", thing
    for module_name, names in LIBRARY.items():
        module = importlib.import_module(module_name)
        for name in names.split():
            yield f"{module_name}.{name}", getattr(module, name)


def _is_builtin(thing: Any) -> bool:
    return getattr(thing, "__module__", None) in ("builtins", "io", "_io")


def _kind(name: str, thing: Any) -> str:
    owner = name.partition(".")[0]
    if isinstance(thing, type) and owner not in _FUNCTION_MODULES:
        if issubclass(thing, BaseException):
            return "exception"
        return "class" if "." in name else "type"
    return "method" if isinstance(getattr(builtins, owner, None), type) else "function"


def first_sentence(docstring: str) -> str:
    """The first sentence that is no signature, at most `MAX_ANSWER_CHARS` long."""
    arrow = ""  # what a signature says it returns: `D.clear() -> None.  Remove all items from D.`
    paragraph: list[str] = []
    for line in docstring.strip().split("\n"):
        signature = _SIGNATURE.match(line)
        if signature and not paragraph:
            arrow = arrow or signature[1] or ""
        elif line.startswith(" ") and not paragraph:
            continue  # the signature goes on
        elif line.strip():
            paragraph.append(line.strip())
        elif paragraph:
            break
    text = " ".join(paragraph)
    if not text or text.startswith(">>>") or arrow[:1].isupper():
        text = arrow
    sentence = " ".join(_SENTENCE_END.split(text, maxsplit=1)[0].split())
    sentence = re.sub(r":( - | d = ).*", ":", sentence)
    if len(sentence) > MAX_ANSWER_CHARS:
        sentence = sentence[: MAX_ANSWER_CHARS - 3].rsplit(" ", 1)[0] + "..."
    if sentence and sentence[-1] not in ".!?:":
        sentence += "."
    return sentence[:1].upper() + sentence[1:]


# ---------------------------------------------------------------- poems and small talk


def poem_pairs(texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """A first line, or a title, and the whole short poem."""
    poems = [match for match in map(_POEM.fullmatch, texts) if match]
    poems = [match for match in poems if len(match[3]) <= MAX_POEM_CHARS]
    titles = Counter(match[1] for match in poems)
    named = Counter((match[1], match[2]) for match in poems)
    firsts = Counter(first_line(match[3]) for match in poems)
    for match in poems:
        title, author, body = match.groups()
        first = first_line(body)
        slots = {"first": first, "title": title, "author": author}
        questions: list[str] = []
        # A question that two poems answer would teach neither.
        questions += POEM_BY_LINE if firsts[first] == 1 else []
        questions += POEM_BY_TITLE if titles[title] == 1 else []
        questions += POEM_BY_AUTHOR if named[title, author] == 1 else []
        for question in questions:
            yield question.format(**slots), match[0]


def first_line(body: str) -> str:
    """What a poem begins with, up to its first mark."""
    return re.split(r"[，。？！；：、\n]", body.strip(), maxsplit=1)[0]


def greeting_pairs() -> Iterator[tuple[str, str]]:
    """Small talk in both languages."""
    for questions, answer in SMALL_TALK:
        for question in questions:
            yield question, answer
