"""The commands as a person runs them: on good input, on bad input, from a pipe, at 80 columns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.language_model_fixture import tiny_language_model
from tests.training.corpus_fixture import tiny_recipe


def glm5(*arguments: str, stdin: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from glm5.cli.app import main; main()", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb", "HF_HUB_OFFLINE": "1"},
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a tokenizer."""
    model = tiny_language_model(max_position_embeddings=4096)
    directory = tmp_path_factory.mktemp("cli") / "model"
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("command", [[], ["chat"], ["generate"], ["train"], ["info"]])
def test_help_fits_80_columns(command: list[str]) -> None:
    done = glm5(*command, "--help")
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_version() -> None:
    assert glm5("--version").stdout.strip() == "glm5 0.1.0"


@pytest.mark.parametrize("ending", ["/exit\nnever asked\n", ""])
def test_piped_chat_answers_each_line_and_ends_with_zero(checkpoint: Path, ending: str) -> None:
    options = ("chat", "--model", str(checkpoint), "-n", "5", "--no-think", "--temperature", "0")
    one = glm5(*options, stdin="hello\n")
    assert one.returncode == 0, one.stderr
    both = glm5(*options, stdin=f"hello\n\n你好\n{ending}")
    assert both.returncode == 0, both.stderr
    assert both.stdout.startswith(one.stdout)
    assert len(both.stdout) > len(one.stdout)
    assert both.stderr == ""


def test_generate_is_reproducible_and_reads_the_input(checkpoint: Path) -> None:
    options = ("--model", str(checkpoint), "-n", "8", "--seed", "7", "--temperature", "1.2")
    first = glm5("generate", "The fox", *options)
    assert first.returncode == 0, first.stderr
    assert first.stdout == glm5("generate", "-", *options, stdin="The fox\n").stdout
    assert (
        first.stdout
        != glm5("generate", "The fox", *options[:4], "--temperature", "1.2", "--seed", "8").stdout
    )


def test_info_of_a_checkpoint_and_of_a_preset(checkpoint: Path) -> None:
    done = glm5("info", str(checkpoint))
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80 + len(str(checkpoint))
    facts = json.loads(glm5("info", str(checkpoint), "--json").stdout)
    assert facts["total"] == sum(part["total"] for part in facts["parameters"].values())
    assert sum(facts["bytes"].values()) > 4 * facts["total"]  # fp32, and the MTP layer
    glm_5 = json.loads(glm5("info", "glm-5", "--json").stdout)
    assert (glm_5["total"], glm_5["active"]) == (743_911_199_232, 40_831_942_656)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "missing"], "missing: no such directory"),
        (["chat", "--model", "missing"], "missing: no such directory"),
        (["generate", "x", "--model", "EMPTY"], "config.json: no such file"),
        (["generate", "x", "--model", "MODEL", "--top-p", "7"], "top_p is 7.0"),
        (["generate", "x", "--model", "MODEL", "--dtype", "int3"], "dtype 'int3' is unknown"),
        (["generate", "x", "--model", "MODEL", "--device", "toaster"], "device 'toaster' is unknown"),
        (["generate", "x" * 30000, "--model", "MODEL"], "tokens; the model holds at most 4096"),
        (["train", "missing.toml"], "missing.toml: cannot be read"),
        (["train", "smoke", "--set", "run.oops=1"], "run.oops: unknown key"),
        (["train", "smoke", "--set", "data.corpus=no-such"], "no-such: cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    checkpoint: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    named = {"MODEL": str(checkpoint), "EMPTY": str(tmp_path)}
    done = glm5(*[named.get(argument, argument) for argument in arguments], cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_train_runs_a_recipe_file_and_goes_on(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)  # writes the corpus
    text = f"""
name = "tiny"
output = "{recipe.output}"
[model]
{chr(10).join(f"{k} = {json.dumps(v)}" for k, v in recipe.model.items())}
[tokenizer]
vocab_size = 400
[data]
corpus = "{recipe.data.corpus}"
shards = "{recipe.data.shards}"
sequence_length = 48
stages = [{{ mix = {{ en = 1.0, zh = 1.0 }} }}]
[run]
steps = 2
batch_rows = 2
"""
    file = tmp_path / "tiny.toml"
    file.write_text(text, encoding="utf-8")
    done = glm5("train", str(file))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("step-0000002")
    more = glm5("train", str(file), "--set", "run.steps=3")
    assert more.returncode == 0, more.stderr
    assert "going on from" in more.stderr
    answer = glm5("generate", "The quick", "--model", more.stdout.strip(), "-n", "3")
    assert answer.returncode == 0, answer.stderr


def test_a_pattern_that_fits_nothing_is_one_line_and_exit_code_2(checkpoint: Path, tmp_path: Path) -> None:
    for option in (("--set", "*.self_atn.*=8"), ("--keep", "*.self_atn.*")):
        done = glm5("quantize", str(checkpoint), str(tmp_path / "int4"), "--group", "32", *option)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert "'*.self_atn.*'" in line and "'*.self_attn.*'" in line
        assert not (tmp_path / "int4").exists()


def test_info_of_a_config_alone_shows_what_it_can(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    done = glm5("info", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "routed experts" in done.stdout
    assert "tensors" not in done.stdout
