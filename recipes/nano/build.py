"""`python -m recipes.nano.build OUT`: downloads, extracts and writes the training text.

Runs fetch, extract and tasks in order, and writes JSONL, a held-out split and a manifest. A source
that fails is named and left out; the others are still built.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from glm5.disk.files import atomic_path, write_atomic
from recipes.nano.extract import documents, is_heldout, simplified_table
from recipes.nano.fetch import fetch
from recipes.nano.sources import SOURCES, CorpusError, Source, select
from recipes.nano.tasks import build_tasks, missing_sources

DEFAULT_SEED = 5


@dataclass(frozen=True)
class Row:
    """What the manifest says of one source."""

    package: str
    version: str
    sha256: str
    licence: str
    language: str
    documents: int
    bytes: int
    heldout_documents: int
    heldout_bytes: int


def build(
    out: Path,
    cache: Path,
    sources: tuple[Source, ...] = SOURCES,
    seed: int = DEFAULT_SEED,
    say: Callable[[str], None] = print,
) -> dict[str, str]:
    """Build these sources and the tasks over them; returns what was left out, and why."""
    skipped: dict[str, str] = {}
    manifest = _read_manifest(out)
    for source in sources:
        say(f"{source.name} ...")
        try:
            row = build_source(source, out, cache, say)
        except CorpusError as error:
            skipped[source.name] = str(error)
            say(f"left out {source.name}: {error}")
            continue
        manifest["sources"][source.name] = asdict(row)
        _write_manifest(out, manifest)  # after each, so that an interrupted build is described
        say(f"{source.name}: {row.documents:,} documents, {row.bytes / 1e6:.2f} MB")
    missing = missing_sources(out)
    if missing:
        say(f"no tasks yet: they need {', '.join(missing)}")
    else:
        manifest["tasks"] = build_tasks(out, out, seed)
    manifest["skipped"] = skipped
    _write_manifest(out, manifest)
    return skipped


def build_source(source: Source, out: Path, cache: Path, say: Callable[[str], None]) -> Row:
    """Write one source's JSONL and its held-out part, both or neither in full."""
    package = fetch(source, cache, say)
    table = _simplified(cache, say) if source.simplify else None
    counts = {False: [0, 0], True: [0, 0]}
    with (
        atomic_path(out / f"{source.name}.jsonl") as kept_path,
        atomic_path(out / "heldout" / f"{source.name}.jsonl") as heldout_path,
        kept_path.open("w", encoding="utf-8") as kept,
        heldout_path.open("w", encoding="utf-8") as heldout,
    ):
        for text in documents(source, package.root, table):
            split = is_heldout(text)
            row = {
                "text": text,
                "source": source.name,
                "language": source.language,
                "licence": source.licence,
            }
            (heldout if split else kept).write(json.dumps(row, ensure_ascii=False) + "\n")
            counts[split][0] += 1
            counts[split][1] += len(text.encode("utf-8"))
    return Row(
        source.package, package.version, package.sha256, source.licence, source.language,
        *counts[False], *counts[True],
    )  # fmt: skip


_TABLES: dict[Path, dict[int, str]] = {}


def _simplified(cache: Path, say: Callable[[str], None]) -> dict[int, str]:
    """The character table, read once a run: three sources need it."""
    if cache not in _TABLES:
        (cedict,) = select(["cc-cedict"])
        _TABLES[cache] = simplified_table(fetch(cedict, cache, say).root)
    return _TABLES[cache]


def _read_manifest(out: Path) -> dict[str, Any]:
    path = out / "manifest.json"
    if not path.exists():
        return {"sources": {}, "tasks": {}, "skipped": {}}
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (json.JSONDecodeError, ValueError) as error:
        raise CorpusError(f"{path}: not JSON ({error}); delete it and build again") from error


def _write_manifest(out: Path, manifest: dict[str, Any]) -> None:
    write_atomic(out / "manifest.json", json.dumps(manifest, ensure_ascii=False, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 when everything was built, 1 when a source was left out, 2 on errors."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.nano.build",
        description="Download and extract the training text that package registries carry.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="directory for the JSONL files")
    parser.add_argument("--cache", type=Path, help="directory for downloads (default OUT/../cache)")
    parser.add_argument("--only", metavar="NAME,...", help="build only these sources")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="seed of the task rows")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    try:
        sources = select(options.only.split(",") if options.only else None)
        with Progress(*columns, console=console, transient=True) as progress:
            job = progress.add_task("starting")

            def say(message: str) -> None:
                progress.update(job, description=message)
                if not message.endswith("..."):
                    progress.console.print(message, highlight=False)

            cache = options.cache or options.out.parent / "cache"
            skipped = build(options.out, cache, sources, options.seed, say)
    except CorpusError as error:
        console.print(f"error: {error}", highlight=False)
        return 2
    return 1 if skipped else 0


if __name__ == "__main__":
    sys.exit(main())
