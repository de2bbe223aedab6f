"""The design's rules that a machine can hold: imports run strictly down, help is light, nothing pickles."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "glm5"

# A part imports itself and parts of lower levels; parts of one level do not know each other.
LEVELS = {
    "errors": 0, "lazy": 0,
    "disk": 1, "metrics": 1, "machine": 1,
    "config": 2,
    "formats": 3, "text": 3, "model": 3,
    "kernels": 4, "checkpoint": 4,
    "layers": 5, "planner": 5,
    "runtime": 6,
    "quantize": 7, "training": 7, "routing": 7,
    "evaluation": 8, "server": 8, "hub": 8,
    "cli": 9, "__init__": 9, "__main__": 10,
}  # fmt: skip
MODULES = sorted(PACKAGE.rglob("*.py"))


def named(path: Path) -> str:
    """`glm5.disk.files` of a path; a package is named by its folder."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {named(path) for path in MODULES}


def imports(path: Path) -> set[str]:
    """Every module of glm5 that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in NAMES else node.module for name in inner}
    return {name for name in found if name == "glm5" or name.startswith("glm5.")}


def part_of(module: str) -> str:
    return [*module.split("."), "__init__"][1]


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_imports_run_strictly_down(path: Path) -> None:
    part = part_of(named(path))
    assert part in LEVELS, f"{part} has no level: add it here and to docs/architecture.md"
    for module in imports(path):
        other = part_of(module)
        api = part == "cli" and other == "__init__"  # the command line is a caller of the public API
        assert other == part or LEVELS[other] < LEVELS[part] or api, f"{named(path)} imports {module}"


def test_no_folder_holds_a_cycle() -> None:
    """Files of one folder import each other in one direction only, packages' own imports apart."""
    graph = {
        named(path): {m for m in imports(path) if part_of(m) == part_of(named(path)) and m in NAMES}
        for path in MODULES
        if path.name != "__init__.py"
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"a ring of imports: {' -> '.join((*trail, module))}"
        if module in done:
            return
        for other in graph.get(module, ()):
            visit(other, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", sorted((PACKAGE / "model").glob("*.py")), ids=lambda p: p.name)
def test_the_network_knows_the_config_alone(path: Path) -> None:
    assert {part_of(module) for module in imports(path)} <= {"model", "config", "errors"}


def test_nothing_unpickles_or_runs_code() -> None:
    forbidden = re.compile(r"torch\.load\(|import pickle|pickle\.|\beval\(|\bexec\(|shell=True|yaml\.load\(")
    for path in MODULES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if ".eval()" not in line and "allow_pickle=False" not in line:
                assert not forbidden.search(line), f"{path}:{number}: {line.strip()}"


def test_nobody_changes_the_class_of_a_module() -> None:
    for path in MODULES:
        assert "__class__ =" not in path.read_text(encoding="utf-8"), path


def test_help_and_import_do_not_load_torch() -> None:
    script = (
        "import sys, glm5, glm5.cli.app\n"
        "from typer.testing import CliRunner\n"
        "result = CliRunner().invoke(glm5.cli.app.app, ['--help'])\n"
        "assert result.exit_code == 0, result.output\n"
        "print([name for name in ('torch', 'numpy', 'transformers', 'tokenizers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_loading_a_model_leaves_the_compiler_alone() -> None:
    """torch._dynamo takes a second to import, and initializing a meta tensor would do it."""
    program = "import sys, glm5; glm5.load('nano'); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
