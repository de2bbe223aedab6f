"""Whatever a file holds: it is read, or refused in one line. No other error, no crash, no hang, no flood of
memory.

Each target is a file that somebody may be given, damaged at random, and what reads it. A few hundred inputs
here; `make fuzz` tries 20,000 (GLM5_SOAK). A failure prints the seed, which makes the same file again.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import glm5
from glm5.cli.conversation import ChatSession
from glm5.config import ModelConfig
from glm5.errors import Glm5Error
from glm5.quantize import Recipe, quantize
from glm5.runtime.engine import Engine
from glm5.runtime.sampling_params import SamplingParams
from glm5.runtime.store import PageStore
from glm5.text.tokenizer import Tokenizer
from glm5.training.corpus import read
from glm5.training.log import RunLog
from glm5.training.recipe import read_recipe
from glm5.training.snapshots import read_state
from tests.checkpoint.gguf.gguf_fixture import lively_model, write_model
from tests.fuzz.damage import damaged
from tests.model_fixture import tiny_config
from tests.runtime.fake_model import FakeModel
from tests.runtime.language_model_fixture import tiny_language_model
from tests.training.corpus_fixture import write_corpus

COUNT = 30 * int(os.environ.get("GLM5_SOAK", "1"))
SECONDS = 10  # for one input, on a busy machine too
MEMORY = 1_500_000  # kB
IDS = torch.tensor([[1, 2, 3]])
RECIPE = """
name = "x"
seed = 1
output = "run"
[data]
corpus = "shipped"
[[data.stages]]
mix = { en = 1.0 }
[model]
hidden_size = 64
num_hidden_layers = 2
[run]
steps = 5
"""


class HangError(BaseException):
    """Longer than anybody would wait."""


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is damaged, whole."""
    root = tmp_path_factory.mktemp("originals")
    model = tiny_language_model(**{"moe_intermediate_size": 64, "q_lora_rank": 64, "v_head_dim": 24})
    model.save_pretrained(root / "floats")
    quantize(root / "floats", root / "int4", Recipe(4, 32))
    write_model(root / "model.gguf", lively_model(tiny_config("glm4_moe")))
    write_corpus(root / "corpus")
    session = ChatSession(model, max_new_tokens=2)
    list(session.answer("hi"))
    session.save(root / "talk.json")
    (root / "recipe.toml").write_text(RECIPE)
    (root / "log.jsonl").write_text("".join(json.dumps({"step": n, "loss": 1.0}) + "\n" for n in range(30)))
    (root / "state").mkdir()
    (root / "state" / "trainer.json").write_text(
        json.dumps({"step": 5, "identity": {"a": "b"}, "rng": [1, 2]})
    )
    return root


def load_and_run(directory: Path) -> None:
    with torch.inference_mode():
        glm5.load(directory, device="cpu")(IDS)


def config_alone(directory: Path) -> None:
    config = ModelConfig.from_pretrained(directory)
    config.total_params()
    config.params_by_part(active=True)


def tokens(directory: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(directory)
    tokenizer.decode(tokenizer.encode("The fox 你好 <|user|>\x00 \ud83e"[:-1]))
    tokenizer.encode("x" * 50)


def talk(directory: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(directory)
    tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


def requantize(directory: Path) -> None:
    quantize(directory, directory.parent / "again", Recipe(4, 32), restart=True)


def convert(directory: Path) -> None:
    quantize(directory / "model.gguf", directory.parent / "converted", Recipe(4, 32), restart=True)


def rows(directory: Path) -> None:
    for _ in read(directory / "corpus" / "tasks-fox.jsonl"):
        pass


def resume_log(directory: Path) -> None:
    RunLog(directory / "log.jsonl").cut(20)


def recipe(directory: Path) -> None:
    read_recipe(directory / "recipe.toml")


def run_state(directory: Path) -> None:
    read_state(directory / "state")


def conversation(directory: Path) -> None:
    ChatSession(tiny_language_model()).load(directory / "talk.json")


def cached_pages(directory: Path) -> None:
    prompt = [n % 50 for n in range(40)]

    def engine() -> Engine:
        return Engine(FakeModel(), cache_tokens=200, page_tokens=8, store=store)  # type: ignore[arg-type]

    store = PageStore(directory / "pages", "a")
    runner = engine()
    first = runner.submit(prompt, SamplingParams(max_new_tokens=2))
    runner.run()
    page = sorted((directory / "pages").glob("*.page"))[0]
    rng = random.Random(len(os.fspath(directory)) + page.stat().st_size)
    page.write_bytes(damaged(page.read_bytes(), rng))
    again = engine()
    second = again.submit(prompt, SamplingParams(max_new_tokens=2))
    again.run()
    assert second.output_ids == first.output_ids


# name: (an original, the file in it that is damaged, what reads it, a share of the inputs)
TARGETS: dict[str, tuple[str, str, Callable[[Path], None], float]] = {
    "config": ("floats", "config.json", config_alone, 2.0),
    "config, whole model": ("floats", "config.json", load_and_run, 1.0),
    "generation defaults": ("floats", "generation_config.json", load_and_run, 1.0),
    "weights": ("floats", "model.safetensors", load_and_run, 2.0),
    "packed weights": ("int4", "model.safetensors", load_and_run, 2.0),
    "packed config": ("int4", "config.json", load_and_run, 1.0),
    "quantize": ("floats", "model.safetensors", requantize, 0.5),
    "tokenizer": ("floats", "tokenizer.json", tokens, 2.0),
    "tokenizer config": ("floats", "tokenizer_config.json", tokens, 1.0),
    "template": ("floats", "chat_template.jinja", talk, 0.2),
    "gguf": ("model.gguf", "model.gguf", convert, 2.0),
    "corpus": ("corpus", "corpus/tasks-fox.jsonl", rows, 2.0),
    "recipe": ("recipe.toml", "recipe.toml", recipe, 2.0),
    "log": ("log.jsonl", "log.jsonl", resume_log, 1.0),
    "run state": ("state", "state/trainer.json", run_state, 1.0),
    "conversation": ("talk.json", "talk.json", conversation, 0.5),
    "cache folder": ("talk.json", "talk.json", cached_pages, 0.5),
}


@pytest.fixture
def alarmed() -> Iterator[None]:
    def rung(*_: object) -> None:
        raise HangError(f"longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, rung)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("target", TARGETS)
def test_it_is_read_or_refused_in_a_line(target: str, originals: Path, tmp_path: Path, alarmed: None) -> None:
    source, file, action, share = TARGETS[target]
    whole = originals / source
    place = tmp_path / "damaged"
    raw = (whole / file if whole.is_dir() and (whole / file).exists() else originals / file).read_bytes()
    if whole.is_dir():
        shutil.copytree(whole, place / (source if "/" in file else ""), dirs_exist_ok=True)
    else:
        place.mkdir()
        shutil.copy(whole, place)
    refused, lines = 0, []
    for number in range(int(COUNT * share)):
        seed = list(TARGETS).index(target) * 1_000_000 + number
        (place / file).write_bytes(damaged(raw, random.Random(seed)))
        signal.alarm(SECONDS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                action(place)
        except Glm5Error as error:
            refused += 1
            lines.append((seed, str(error)))
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}") from error
        finally:
            signal.alarm(0)
    for seed, line in lines:
        assert "\n" not in line and 0 < len(line) <= 2000, f"seed {seed}"
    assert refused or target in ("log", "cache folder", "generation defaults", "template", "weights")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < MEMORY
