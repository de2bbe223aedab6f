"""The calibration text: how it becomes windows, and what is refused in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from glm5.cli.app import app
from glm5.errors import CheckpointError, RecipeError
from glm5.evaluation.compare import LANGUAGES
from glm5.evaluation.compare import _shipped as heldout
from glm5.hub import resolve
from glm5.layers.loading import load_model
from glm5.quantize import Calibration, quantize
from glm5.quantize.calibration import calibration_of, read_texts, shipped_text, tokenizer_of
from glm5.quantize.sources import open_source
from glm5.text.control_tokens import GMASK, SOP
from glm5.text.tokenizer import Tokenizer
from tests.checkpoint.checkpoint_fixture import refused, with_tensors
from tests.model_fixture import random_ids
from tests.quantize.quantize_fixture import RECIPE, contents, save_source, small_config
from tests.quantize.quantize_fixture import no_flushing as no_flushing
from tests.runtime.language_model_fixture import tiny_language_model
from tests.text.tokenizer_fixture import small_tokenizer

IDS = Calibration(tuple(tuple(row) for row in random_ids(4, 16).tolist()))
WIDTHS = {"moe_intermediate_size": 64, "q_lora_rank": 64, "v_head_dim": 24}


@pytest.fixture(scope="module")
def nano() -> Tokenizer:
    return Tokenizer.from_pretrained(resolve("nano"))


def test_windows_hold_the_text_in_order(nano: Tokenizer) -> None:
    texts = ["One text. " * 60, "另一段文字。" * 60]
    calibration = Calibration.from_texts(nano, texts, num_tokens=200, max_seq_length=50)
    start = (nano.control_ids[GMASK], nano.control_ids[SOP])
    ids = [*nano.encode(texts[0]), *nano.encode(texts[1])]
    assert all(window[:2] == start and len(window) <= 50 for window in calibration.input_ids)
    assert [i for window in calibration.input_ids for i in window[2:]] == ids[:200]
    assert calibration.num_tokens == 200 + 2 * len(calibration.input_ids)


def test_the_shipped_text_is_of_both_languages_and_not_the_one_that_judges(nano: Tokenizer) -> None:
    text = shipped_text()
    assert len(text.encode()) <= 60_000
    assert len(nano.encode(text)) > 10_000
    for part in (text[:8000], text[-8000:]):  # few tokens, too, see every kind
        chinese = sum("\u4e00" <= letter <= "\u9fff" for letter in part)
        assert 800 < chinese < 7000
    for language in LANGUAGES:
        for line in heldout(language).split("\n"):
            assert not line or line not in text


@pytest.mark.parametrize(
    ("texts", "options", "word"),
    [
        (["Short."], {}, "gives 1 tokens; give at least 128"),
        ([""], {}, "gives 0 tokens"),
        (None, {"num_tokens": 0}, "0 calibration tokens"),
        (None, {"num_tokens": -5}, "-5 calibration tokens"),
        (None, {"max_seq_length": 2}, "windows of 2 are too few"),
    ],
)
def test_too_little_text_is_refused(
    texts: list[str] | None, options: dict[str, int], word: str, nano: Tokenizer
) -> None:
    if texts == ["Short."]:
        word = word.replace("1 tokens", f"{len(nano.encode('Short.'))} tokens")
    with refused(RecipeError, word):
        Calibration.from_texts(nano, texts, **options)


@pytest.mark.parametrize("ids", [(), ((),), ((1, 2), ())])
def test_windows_without_tokens_are_refused(ids: tuple[tuple[int, ...], ...]) -> None:
    with refused(RecipeError, "without tokens"):
        Calibration(ids)


@pytest.mark.parametrize("value", [0.0, -0.1, 1.5, float("nan")])
def test_an_impossible_damping_is_refused(value: float) -> None:
    with refused(RecipeError, "dampening_frac"):
        Calibration(((1,),), dampening_frac=value)


def test_files_that_are_no_text_are_named(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("早安", encoding="utf-8")
    bad.write_bytes("早安".encode("gbk"))
    assert read_texts([good, good]) == ["早安", "早安"]
    for file, word in (
        (bad, "is not UTF-8"),
        (tmp_path / "none.txt", "No such file"),
        (tmp_path, "directory"),
    ):
        with refused(RecipeError, file, word):
            read_texts([good, file])


def test_what_does_not_go_together_on_a_command_line(tmp_path: Path) -> None:
    with refused(RecipeError, "'awq'", "nearest or gptq"):
        calibration_of(tmp_path, "awq", [], None)
    for files, tokens in (([tmp_path], None), ([], 100)):
        with refused(RecipeError, "add --method gptq"):
            calibration_of(tmp_path, "nearest", files, tokens)
    assert calibration_of(tmp_path, "nearest", [], None) is None


def test_a_source_without_tokenizer_needs_ids(tmp_path: Path) -> None:
    save_source(tmp_path / "source")
    with refused(CheckpointError, tmp_path / "source", "tokenizer.json", "Calibration(input_ids)"):
        calibration_of(tmp_path / "source", "gptq", [], None)
    with refused(CheckpointError, tmp_path / "source", "token 256 is none of its 256"):
        quantize(tmp_path / "source", tmp_path / "int4", RECIPE, calibration=Calibration(((3, 256),)))
    assert not (tmp_path / "int4").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.layers.1.mlp.experts.5.up_proj.weight", ".experts.5.up_proj.weight holds an infinite weight"),
        ("model.layers.1.self_attn.o_proj.weight", "o_proj.weight holds an infinite weight or NaN"),
        ("model.layers.1.self_attn.kv_b_proj.weight", "model.layers.1"),
        ("model.embed_tokens.weight", "model.layers.0"),
    ],
)
def test_weights_that_are_not_finite_are_named(tmp_path: Path, name: str, said: str) -> None:
    save_source(tmp_path / "source", small_config("glm_moe_dsa"))
    with_tensors(tmp_path / "source", lambda tensors: tensors[name].fill_(float("nan")))
    with refused(CheckpointError, tmp_path / "source", said):
        quantize(tmp_path / "source", tmp_path / "int4", RECIPE, calibration=IDS)
    assert not list(tmp_path.rglob("int4/*.safetensors"))


def test_the_disk_must_hold_the_walk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_source(tmp_path / "source")
    usage = shutil.disk_usage(tmp_path)._replace(free=(64 << 20) + 400_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    long = Calibration(tuple(IDS.input_ids * 64))  # 4096 tokens: 2 MB of hidden states
    with refused(CheckpointError, "the disk has"):
        quantize(tmp_path / "source", tmp_path / "int4", RECIPE, calibration=long)
    quantize(tmp_path / "source", tmp_path / "int4", RECIPE, restart=True)


def test_the_command_line(tmp_path: Path) -> None:
    tiny_language_model(**WIDTHS).save_pretrained(tmp_path / "source", stored="bf16")
    (tmp_path / "text.txt").write_text("The quick brown fox. 北京今天天气很好。\n" * 40, encoding="utf-8")
    command = [
        "quantize",
        str(tmp_path / "source"),
        str(tmp_path / "int4"),
        "--group",
        "32",
        "--method",
        "gptq",
    ]
    command += ["--calibration", str(tmp_path / "text.txt"), "--calibration-tokens", "300"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "text.txt").read_text(encoding="utf-8")
    calibration = Calibration.from_texts(small_tokenizer(), [text], 300)
    quantize(tmp_path / "source", tmp_path / "by hand", RECIPE, calibration=calibration)
    assert contents(tmp_path / "int4") == contents(tmp_path / "by hand")
    assert torch.isfinite(load_model(tmp_path / "int4")(random_ids(1, 9)).logits).all()


def test_the_tokenizer_comes_with_the_weights(tmp_path: Path) -> None:
    model = tiny_language_model(**WIDTHS)
    model.save_pretrained(tmp_path / "source", stored="bf16")
    found = tokenizer_of(open_source(tmp_path / "source"))
    assert found.encode("The fox, 北京") == model.tokenizer.encode("The fox, 北京")
    assert found.control_ids == model.tokenizer.control_ids
