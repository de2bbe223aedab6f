"""The documentation's Python examples run as they stand."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from glm5 import errors
from glm5.cli.page import page

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "example", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_page_of_commands_is_up_to_date() -> None:
    found = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert found == page(), "run: python -m glm5.cli.page > docs/cli.md"


MESSAGES = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text("utf-8"), re.M)


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_of_the_troubleshooting_page_are_those_of_the_code(message: str) -> None:
    """Every stretch between two `...` stands in one string of the sources."""
    for stretch in message.split("..."):
        assert stretch.strip() in STRINGS, stretch


def _strings() -> str:
    """All string literals of the package, their f-string parts apart."""
    found = []
    for path in (ROOT / "src" / "glm5").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


STRINGS = _strings()


def test_the_error_tree_of_the_docs_is_the_code() -> None:
    tree = re.search(
        r"^Glm5Error .*?(?=\n```)", (ROOT / "docs" / "generate.md").read_text("utf-8"), re.M | re.S
    )
    assert tree is not None
    names = re.findall(r"(\w+Error)\b  ", tree.group(0))
    assert set(names) == {name for name in vars(errors) if name.endswith("Error")}
    shown = "\n".join(f"    {line}" for line in tree.group(0).splitlines())
    assert errors.__doc__ is not None
    assert shown in errors.__doc__
