"""The design's rules that a machine can hold: imports run downward, help is light, nothing pickles."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "glm5"

# Lower number = lower layer; a module may import its own layer and those below.
LAYERS = {
    "errors": 0, "files": 0, "special_tokens": 0, "presets": 0, "config": 1, "config_checks": 1,
    "template_sandbox": 1, "chat_template": 1, "tokenizer": 2, "model": 2,
    "kernels": 3, "checkpoint": 3, "runtime": 4, "quantize": 4, "auto": 5, "training": 5, "describe": 6,
    "chat_session": 6, "loading_bar": 6, "cli": 7, "__init__": 8,
}  # fmt: skip
# Late imports that point up on purpose: the presets are data of the config.
ALLOWED = {("presets", "config")}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name == "glm5":
                found.add("__init__")
            elif name.startswith("glm5."):
                found.add(name.split(".")[1])
    return found


def part_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downward(path: Path) -> None:
    part = part_of(path)
    assert part in LAYERS, f"{part} has no layer: add it here and to the design"
    for other in imports(path):
        if part == "cli" and other == "__init__":
            continue  # the command line is a caller of the public API
        assert LAYERS[other] <= LAYERS[part] or (part, other) in ALLOWED, f"{path} imports glm5.{other}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "model").glob("*.py")), ids=lambda p: p.name)
def test_the_network_knows_only_the_config(path: Path) -> None:
    assert imports(path) <= {"model", "config"}


def test_nothing_unpickles_or_runs_code() -> None:
    forbidden = re.compile(r"torch\.load\(|import pickle|pickle\.|\beval\(|\bexec\(|shell=True|yaml\.load\(")
    for path in PACKAGE.rglob("*.py"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if ".eval()" not in line and "allow_pickle=False" not in line:
                assert not forbidden.search(line), f"{path}:{number}: {line.strip()}"


def test_help_and_import_do_not_load_torch() -> None:
    script = (
        "import sys, glm5, glm5.cli\n"
        "from typer.testing import CliRunner\n"
        "result = CliRunner().invoke(glm5.cli.app, ['--help'])\n"
        "assert result.exit_code == 0, result.output\n"
        "print([name for name in ('torch', 'numpy', 'transformers', 'tokenizers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_loading_a_model_leaves_the_compiler_alone() -> None:
    """torch._dynamo takes a second to import, and initialising a meta tensor would do it."""
    program = "import sys, glm5; glm5.load('nano'); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
