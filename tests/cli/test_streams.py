"""Closed, full and wrongly encoded streams: a line and exit code 2, or the answer; never a traceback."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.language_model_fixture import tiny_language_model

GLM5 = [sys.executable, "-m", "glm5"]
pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full and a POSIX shell")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("streams") / "model [int4]"
    tiny_language_model(max_position_embeddings=64).save_pretrained(directory)
    return directory


def run(
    words: list[str], shell: str = "", feed: bytes | None = None, **variables: str
) -> tuple[int, str, str]:
    """(exit code, output, error text) of a command in a shell."""
    done = subprocess.run(
        ["bash", "-c", f"{shlex.join([*GLM5, *words])} {shell}"],
        input=feed,
        capture_output=True,
        timeout=300,
        check=False,
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **variables},
    )
    error = done.stderr.decode("utf-8", "replace")
    assert "Traceback" not in error
    return done.returncode, done.stdout.decode("utf-8", "replace"), error


@pytest.mark.parametrize(
    ("words", "shell", "code", "says"),
    [
        (["generate", "hi", "-n", "2", "-m", "MODEL"], "> /dev/full", 2, "No space left on device"),
        (["info", "glm-5"], "> /dev/full", 2, "No space left on device"),
        (["info", "glm-5"], "| head -1 > /dev/null; exit ${PIPESTATUS[0]}", 0, ""),
        (["chat", "-n", "2", "-m", "MODEL"], "<&-", 0, ""),
        (["generate", "-", "-n", "2", "-m", "MODEL"], "<&-", 0, ""),
        (["generate", "hi", "-n", "2", "-m", "MODEL"], ">&-", 2, "standard output is closed"),
    ],
)
def test_streams_that_are_closed_or_full(
    checkpoint: Path, words: list[str], shell: str, code: int, says: str
) -> None:
    found, _, error = run([str(checkpoint) if word == "MODEL" else word for word in words], shell)
    assert found == code, error
    assert says in error


def test_without_stderr_the_answer_still_comes(checkpoint: Path) -> None:
    code, out, _ = run(["generate", "hi", "-n", "4", "-m", str(checkpoint)], "2>&-")
    assert code == 0
    assert out.strip()


@pytest.mark.parametrize("words", [["generate", "-", "-n", "2"], ["chat", "-n", "2"]])
def test_input_of_another_encoding_is_named(checkpoint: Path, words: list[str]) -> None:
    code, _, error = run([*words, "-m", str(checkpoint)], feed=b"caf\xe9\n", PYTHONIOENCODING="utf-8")
    assert code == 2
    assert "the input is not utf-8 at byte 3" in error


def test_output_that_cannot_show_a_character(checkpoint: Path) -> None:
    words = ["generate", "hi", "-n", "30", "--temperature", "3", "--seed", "1", "-m", str(checkpoint)]
    code, out, _ = run(words, PYTHONIOENCODING="ascii")
    assert code == 0
    assert out.isascii()


def test_brackets_in_a_path_are_text(checkpoint: Path) -> None:
    code, out, _ = run(["info", str(checkpoint)])
    assert code == 0
    assert str(checkpoint) in out.replace("\n", "")
