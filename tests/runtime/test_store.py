"""Pages on disk: found again by another process, never wrong, bounded, harmless when the disk is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import glm5
from glm5.errors import RequestError
from glm5.runtime.engine import Engine
from glm5.runtime.request import Request
from glm5.runtime.sampling_params import SamplingParams
from glm5.runtime.store import PageStore
from tests.runtime.fake_model import FakeModel
from tests.runtime.language_model_fixture import tiny_language_model

PROMPT = [n % 50 for n in range(60)]


def engine_of(store: PageStore, tokens: int = 400) -> Engine:
    return Engine(FakeModel(), cache_tokens=tokens, page_tokens=8, store=store)  # type: ignore[arg-type]


def said(engine: Engine, prompt: list[int] = PROMPT, **options: Any) -> Request:
    request = engine.submit(prompt, SamplingParams(max_new_tokens=3), **options)
    engine.run()
    assert request.error is None
    return request


def test_another_engine_finds_what_was_read(tmp_path: Path) -> None:
    first = said(engine_of(PageStore(tmp_path, "a")))
    engine = engine_of(PageStore(tmp_path, "a"))
    second = said(engine)
    assert second.output_ids == first.output_ids
    assert (first.statistics.cached_tokens, second.statistics.cached_tokens) == (0, 56)
    assert said(engine, owner="other").statistics.cached_tokens == 0
    engine.forget()
    assert engine.pool.free_pages == engine.pool.num_pages
    assert oct(tmp_path.stat().st_mode & 0o777) != "0o777"
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.glob("*.page"))


def test_a_page_that_is_damaged_is_read_anew(tmp_path: Path) -> None:
    first = said(engine_of(PageStore(tmp_path, "a")))
    for number, path in enumerate(sorted(tmp_path.glob("*.page"))):
        content = bytearray(path.read_bytes())
        if number % 3 == 0:
            content[-1 - number] ^= 1
        elif number % 3 == 1:
            del content[len(content) // 2 :]
        else:
            content.clear()
        path.write_bytes(content)
    again = said(engine_of(PageStore(tmp_path, "a")))
    assert again.output_ids == first.output_ids
    assert again.statistics.cached_tokens == 0
    assert said(engine_of(PageStore(tmp_path, "a"))).statistics.cached_tokens == 56


def test_the_folder_is_bounded_and_the_oldest_go_first(tmp_path: Path) -> None:
    store = PageStore(tmp_path, "a", max_bytes=30_000)
    for start in range(12):
        said(engine_of(store), [(start + n) % 50 for n in range(30)])
        assert sum(p.stat().st_size for p in tmp_path.glob("*.page")) <= 30_000
    last = said(engine_of(store), [(11 + n) % 50 for n in range(30)])
    assert last.statistics.cached_tokens == 24


def test_a_full_or_lost_folder_is_told_once_and_the_engine_lives(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(PageStore(tmp_path, "a"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    one, other = said(engine), said(engine, PROMPT[::-1])
    assert one.finish_reason == other.finish_reason == "length"
    assert caplog.text.count("No space left on device; nothing more is kept there") == 1
    assert list(tmp_path.glob("*.page")) == list(tmp_path.glob(".*.tmp")) == []


def test_a_folder_of_another_model_or_of_other_things_is_refused(tmp_path: Path) -> None:
    PageStore(tmp_path / "one", "a")
    with pytest.raises(RequestError, match="holds the cache of another model or version"):
        PageStore(tmp_path / "one", "b")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "letter.txt").write_text("dear")
    with pytest.raises(RequestError, match="is not empty and no cache folder"):
        PageStore(tmp_path / "two", "a")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RequestError, match="file: "):
        PageStore(tmp_path / "file", "a")
    with pytest.raises(RequestError, match="the size of the cache folder is 0"):
        PageStore(tmp_path / "three", "a", max_bytes=0)
    (tmp_path / "one" / "cache.json").write_text("{")
    with pytest.raises(RequestError, match=r"cache\.json"):
        PageStore(tmp_path / "one", "a")


def test_a_model_keeps_its_prompts_between_processes(tmp_path: Path) -> None:
    tiny_language_model().save_pretrained(tmp_path / "model")
    found = []
    for _ in range(2):
        model = glm5.load(tmp_path / "model")
        model.start_engine(cache_dir=tmp_path / "cache")
        found.append(model.complete("The quick brown fox " * 60, max_new_tokens=5))
    assert found[0].ids == found[1].ids
    assert found[0].statistics.cached_tokens == 0
    assert found[1].statistics.cached_tokens >= found[1].prompt_tokens // 64 * 64 - 64
    with pytest.raises(RequestError, match="loaded from a checkpoint"):
        tiny_language_model().start_engine(cache_dir=tmp_path / "cache")


WRITER = """
import sys
from tests.runtime.test_store import engine_of, said
from glm5.runtime.store import PageStore
from pathlib import Path
print("ready", flush=True)
for start in range(10_000):
    said(engine_of(PageStore(Path(sys.argv[1]), "a", max_bytes=200_000)), [(start * 7 + n) % 50 for n in
    range(50)])
"""


def test_a_kill_leaves_old_pages_or_new_ones(tmp_path: Path) -> None:
    rounds = 4 * int(os.environ.get("GLM5_SOAK", "1"))
    for number in range(rounds):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02 + 0.03 * (number % 7))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        store = PageStore(tmp_path, "a", max_bytes=200_000)
        for left in tmp_path.glob(".*.tmp"):  # another process might be writing it, for an hour
            os.utime(left, (0, 0))
        store = PageStore(tmp_path, "a", max_bytes=200_000)
        assert not list(tmp_path.glob(".*.tmp"))
        plain = Engine(FakeModel(), cache_tokens=400, page_tokens=8)  # type: ignore[arg-type]
        for start in range(0, 40, 5):
            prompt = [(start * 7 + n) % 50 for n in range(50)]
            assert said(engine_of(store), prompt).output_ids == said(plain, prompt).output_ids
