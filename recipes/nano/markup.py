"""Turns HTML and manual-page source into plain text, and any text into a normal form.

Pure functions from string to string; block and paragraph structure is kept, navigation is not.
Which files to read is decided in `extract`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from itertools import pairwise

PRE_INDENT = "    "
# Shorter lines (headings such as "RETURN VALUE", "返回值") repeat for good reasons.
MIN_DEDUPE_CHARS = 20

_HAN = "\u3400-\u4dbf\u4e00-\u9fff"
_CJK_END = f"[{_HAN}\u3001\u3002\uff0c\uff1a\uff1b\uff01\uff1f\uff08\uff09\u201c\u201d]"
_CJK_BREAK = re.compile(rf"(?<={_CJK_END})[ \t]*\n[ \t]*(?={_CJK_END})")
_HAN_CHAR = re.compile(f"[{_HAN}]")
# Zero-width characters, the byte-order mark and soft hyphens carry no text either.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028\u2029\ufeff]")
_TRAILING = re.compile(r"[ \t\u3000]+$", re.MULTILINE)
_BLANK_RUN = {lines: re.compile("\n" * (lines + 2) + "+") for lines in (1, 2)}


def normalize(text: str, empty_lines: int = 1) -> str:
    """NFC, no control characters, no trailing blanks, few empty lines in a row (code has two)."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\u00a0", " ")
    text = _TRAILING.sub("", _CONTROL.sub("", text))
    return _BLANK_RUN[empty_lines].sub("\n" * (empty_lines + 1), text).strip("\n")


def han_ratio(text: str) -> float:
    """The share of Chinese characters among all that are not blank."""
    visible = sum(not char.isspace() for char in text)
    return len(_HAN_CHAR.findall(text)) / visible if visible else 0.0


def join_lines(text: str) -> str:
    """One paragraph on one line; Chinese continues without a blank."""
    return " ".join(_CJK_BREAK.sub("", text).split())


class LineDedupe:
    """Drops prose lines that an earlier document of the same source already had.

    Indented lines are code or tables, where repetition means something: they stay.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, text: str) -> str:
        return "\n".join(line for line in text.split("\n") if self._is_new(line))

    def _is_new(self, line: str) -> bool:
        if len(line) < MIN_DEDUPE_CHARS or line.startswith(PRE_INDENT):
            return True
        if line in self._seen:
            return False
        self._seen.add(line)
        return True


# ---------------------------------------------------------------- HTML

_SKIPPED_TAGS = frozenset(
    [
        "head",
        "script",
        "style",
        "nav",
        "header",
        "footer",
        "noscript",
        "svg",
        "button",
        "form",
        "select",
        "template",
        "aside",
        "iframe",
        "object",
        "audio",
        "video",
    ]
)
_SKIPPED_CLASSES = frozenset(
    [
        "headerlink",
        "viewcode-link",
        "navheader",
        "navfooter",
        "docnav",
        "sphinxsidebar",
        "related",
        "indexterm",
        "linenos",
        "wy-nav-side",
        "wy-nav-top",
        "wy-breadcrumbs",
        "rst-footer-buttons",
        "toctree-wrapper",
        "toc",
        "contents",
        "howtoget",
        "versionmodified-none",
        "relatedtopics",
    ]
)
_SKIPPED_ROLES = frozenset({"navigation", "search", "contentinfo"})
_SKIPPED_IDS = frozenset({"banner", "title", "sidebar", "toc", "TopLeftHeader"})
_VOID = frozenset(
    [
        "area",
        "base",
        "br",
        "col",
        "embed",
        "hr",
        "img",
        "input",
        "link",
        "meta",
        "param",
        "source",
        "track",
        "wbr",
    ]
)
_BLOCKS = frozenset(
    [
        "p",
        "div",
        "section",
        "article",
        "main",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "ul",
        "ol",
        "li",
        "dl",
        "dt",
        "dd",
        "table",
        "tr",
        "blockquote",
        "pre",
        "figure",
        "figcaption",
        "hr",
        "center",
        "body",
        "td",
        "th",
    ]
)


class _TextParser(HTMLParser):
    """Collects blocks of text; knows which elements are furniture."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = []
        self._line: list[str] = []
        self._cells: list[str] | None = None
        self._pre = 0
        self._bullet = False
        self._skip_tag = ""  # the furniture element we are in, and how deep in its namesakes
        self._skip_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skip_tag:
            self._skip_depth += tag == self._skip_tag
            return
        if tag not in _VOID and _is_furniture(tag, dict(attrs)):
            self._flush()
            self._skip_tag, self._skip_depth = tag, 1
            return
        if tag == "br":
            self._line.append("\n" if self._pre else "\x00")
        elif tag in _BLOCKS:
            self._flush()
            self._pre += tag == "pre"
            self._bullet |= tag == "li"
            if tag == "tr":
                self._cells = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # XHTML writes <a id="x"/>: such an element has no text and opens nothing.
        if tag in _VOID:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if self._skip_tag:
            self._skip_depth -= tag == self._skip_tag
            if self._skip_depth == 0:
                self._skip_tag = ""
            return
        if tag in _BLOCKS:
            self._flush()
            if tag == "pre":
                self._pre = max(0, self._pre - 1)
            if tag in ("tr", "table") and self._cells is not None:
                row, self._cells = self._cells, None
                if row:
                    self.blocks.append(" | ".join(row))

    def handle_data(self, data: str) -> None:
        if not self._skip_tag:
            self._line.append(data)

    def close(self) -> None:
        super().close()
        self._flush()

    def _flush(self) -> None:
        raw, self._line = "".join(self._line), []
        if not raw.strip():
            return
        if self._pre:
            lines = raw.replace("\x00", "\n").strip("\n").split("\n")
            self.blocks.append("\n".join(PRE_INDENT + line if line else "" for line in lines))
            return
        text = "\n".join(filter(None, map(join_lines, raw.split("\x00"))))
        if self._bullet:
            text, self._bullet = "- " + text, False
        if self._cells is not None:
            self._cells.append(text)
        else:
            self.blocks.append(text)


def _is_furniture(tag: str, attrs: dict[str, str | None]) -> bool:
    if tag in _SKIPPED_TAGS or attrs.get("role") in _SKIPPED_ROLES:
        return True
    if attrs.get("id") in _SKIPPED_IDS:
        return True
    classes = attrs.get("class")
    return bool(classes) and not _SKIPPED_CLASSES.isdisjoint((classes or "").split())


def html_to_text(html: str) -> str:
    """The paragraphs of a page, one block a paragraph; list items stay close together."""
    parser = _TextParser()
    parser.feed(html)
    parser.close()
    out: list[str] = []
    for before, block in pairwise(["", *parser.blocks]):
        tight = not before or (before.startswith("- ") and block.startswith("- "))
        out.append(block if tight else "\n" + block)
    return "\n".join(out)


# ---------------------------------------------------------------- roff manual pages

_ESCAPES = {
    r"\-": "-",
    r"\&": "",
    r"\ ": " ",
    r"\~": " ",
    r"\0": " ",
    r"\|": "",
    r"\^": "",
    r"\,": "",
    r"\/": "",
    r"\%": "",
    r"\:": "",
    r"\c": "",
    r"\e": "\\",
    r"\'": "'",
    r"\`": "`",
    r"\.": ".",
    r"\(aq": "'",
    r"\(cq": "\u2019",
    r"\(oq": "\u2018",
    r"\(dq": '"',
    r"\(lq": "\u201c",
    r"\(rq": "\u201d",
    r"\(em": "\u2014",
    r"\(en": "\u2013",
    r"\(bu": "\u2022",
    r"\(co": "\u00a9",
    r"\(ha": "^",
    r"\(ti": "~",
    r"\(rs": "\\",
    r"\(ga": "`",
    r"\(mu": "\u00d7",
    r"\(+-": "\u00b1",
    r"\(<=": "\u2264",
    r"\(>=": "\u2265",
    r"\(->": "\u2192",
    r"\(mc": "\u00b5",
}
_ROFF_COMMENT = re.compile(r'\\["#].*$')
_ROFF_ESCAPE = re.compile(
    r"\\f(?:\[[^\]]*\]|\(..|.)|\\s[-+]?\d|\\\*(?:\[[^\]]*\]|\(..|.)|\\[hvwlz]'[^']*'"
    r"|\\m?\[[^\]]*\]|\\\(..|\\."
)
_JOINED = frozenset({"BR", "RB", "IR", "RI", "BI", "IB"})
_SPACED = frozenset({"B", "I", "SM", "SB", "R", "Nm", "Ar", "Fl", "Xr", "Nd", "Pa", "Op", "Em"})
_BREAKS = frozenset({"PP", "P", "LP", "sp", "TP", "IP", "HP", "RS", "RE", "TQ", "br", "Pp", "It"})
_BLOCK_END = {"de": "..", "ig": "..", "TS": ".TE", "EQ": ".EN"}
_PREFORMATTED = {"nf": True, "EX": True, "Bd": True, "fi": False, "EE": False, "Ed": False}
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|(\S+)')


def roff_to_text(source: str) -> str:
    """A manual page as plain paragraphs; "" for a page that only points to another one."""
    if source.lstrip().startswith(".so "):
        return ""
    out: list[str] = []
    paragraph: list[str] = []
    preformatted = False
    tag_next = False  # .TP: the next line names what the paragraph explains
    for line in _roff_lines(source):
        macro, arguments = _roff_macro(line)
        pieces = len(paragraph)
        if macro in _PREFORMATTED or macro in _BREAKS or macro in ("SH", "SS", "Sh", "Ss"):
            _flush_roff(out, paragraph, preformatted)
            preformatted = _PREFORMATTED.get(macro, preformatted)
            if macro in ("SH", "SS", "Sh", "Ss") and arguments:
                out.append(" ".join(arguments))
                preformatted = False
            elif macro in ("IP", "It") and arguments:
                paragraph.append(_as_tag(arguments[0]))
            tag_next = macro == "TP"
        elif macro in _JOINED:
            paragraph.append("".join(arguments))
        elif macro in _SPACED:
            paragraph.append(" ".join(arguments))
        elif macro == "":
            if line.strip():
                paragraph.append(unescape_roff(line))
            elif preformatted:
                paragraph.append("")
            else:
                _flush_roff(out, paragraph, preformatted)
        if tag_next and len(paragraph) > pieces:
            paragraph[-1], tag_next = _as_tag(paragraph[-1]), False
    _flush_roff(out, paragraph, preformatted)
    return "\n\n".join(out)


def _as_tag(text: str) -> str:
    return text if len(text) < 2 or text.endswith((":", "：", ".")) else text + ":"


def unescape_roff(text: str) -> str:
    """Text without font changes, and with special characters as themselves."""
    return _ROFF_ESCAPE.sub(lambda match: _ESCAPES.get(match.group(), ""), text)


def _roff_lines(source: str) -> Iterator[str]:
    end = ""
    for raw in source.replace("\\\n", "").split("\n"):
        line = _ROFF_COMMENT.sub("", raw)
        if end:
            end = "" if line.startswith(end) else end
            continue
        macro = line[1:].split(maxsplit=1)[0] if line[:1] in ".'" and line[1:].strip() else ""
        if macro in _BLOCK_END:
            end = _BLOCK_END[macro]
            continue
        if raw and not line.strip():
            continue  # a comment on its own breaks no paragraph
        yield line


def _roff_macro(line: str) -> tuple[str, list[str]]:
    """The macro's name and its arguments; ("", []) for a line of text."""
    if line[:1] not in (".", "'") or line[:2] == "'\"":
        return "", []
    name, _, rest = line[1:].strip().partition(" ")
    arguments = [unescape_roff(bare or quoted.replace('""', '"')) for quoted, bare in _ARGUMENT.findall(rest)]
    return name or "ignored", arguments


def _flush_roff(out: list[str], paragraph: list[str], preformatted: bool) -> None:
    if any(line.strip() for line in paragraph):
        if preformatted:
            out.append("\n".join(PRE_INDENT + line if line else "" for line in paragraph))
        else:
            out.append(join_lines("\n".join(paragraph)))
    paragraph.clear()


def chunks(lines: Iterable[str], size: int = 2000, separator: str = "\n") -> Iterator[str]:
    """Short lines gathered into documents of about `size` characters."""
    held: list[str] = []
    length = 0
    for line in lines:
        held.append(line)
        length += len(line)
        if length >= size:
            yield separator.join(held)
            held, length = [], 0
    if held:
        yield separator.join(held)
