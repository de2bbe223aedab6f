"""The familiar door: the snippet of the article, text in and out, and what is refused."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import glm5
from glm5 import AutoModelForCausalLM, AutoTokenizer, LanguageModel, Result, SamplingParams
from glm5.errors import CheckpointError, ConfigError, RequestError, TemplateError
from glm5.hub import resolve
from glm5.layers.packed import PackedExperts, PackedLinear
from tests.runtime.language_model_fixture import tiny_language_model
from tests.text.tokenizer_fixture import small_tokenizer

TALK = [{"role": "user", "content": "Weather in Oslo?"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    tiny_language_model().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LanguageModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint)


# --- the snippet -----------------------------------------------------------------------------


def test_the_snippet_of_the_article_works(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        str(checkpoint), device_map="auto", torch_dtype=torch.float32, trust_remote_code=True
    )
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint), trust_remote_code=True)
    inputs = tokenizer("The quick brown fox", return_tensors="pt").to(model.device)
    outputs = model.generate(**inputs, max_new_tokens=8, eos_token_id=[])
    length = inputs.input_ids.shape[1]
    assert outputs.shape == (1, length + 8)
    assert outputs.dtype == torch.int64
    assert torch.equal(outputs[:, :length], inputs.input_ids)
    text = tokenizer.decode(outputs[0], skip_special_tokens=True)
    assert text.startswith("The quick brown fox")
    logits = model(inputs.input_ids).logits
    assert logits.shape == (1, length, tokenizer.vocab_size)
    assert logits[0, -1].argmax() == outputs[0, length]


def test_a_padded_batch_is_each_prompt_alone(model: LanguageModel) -> None:
    tokenizer = small_tokenizer()
    texts = ["fox", "The quick brown fox jumps", "dog."]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    together = model.generate(**batch, max_new_tokens=6, eos_token_id=[])
    width = batch.input_ids.shape[1]
    assert torch.equal(together[:, :width], batch.input_ids)
    for row, text in zip(together, texts, strict=True):
        alone = tokenizer(text, return_tensors="pt")
        out = model.generate(alone.input_ids, max_new_tokens=6, eos_token_id=[])
        assert torch.equal(row[width:], out[0, alone.input_ids.shape[1] :])


# --- loading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, {"": torch.device("cpu")}, None])
def test_devices_by_every_usual_name(checkpoint: Path, device_map: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=device_map)
    assert model.device.type == "cpu" or (device_map == "auto" and torch.cuda.is_available())


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("fp16", torch.float16), (torch.bfloat16,) * 2],
)
def test_dtypes_by_every_usual_name(checkpoint: Path, dtype: Any, expected: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    assert model.dtype == expected
    out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, eos_token_id=[])
    assert out.shape == (1, 5)


def test_load_in_4bit_rounds_while_loading(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map="auto", load_in_4bit=True)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    packed = [module for module in model.modules() if isinstance(module, (PackedLinear, PackedExperts))]
    assert packed and not [m for m in plain.modules() if isinstance(m, (PackedLinear, PackedExperts))]
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        apart = (model(ids).logits - plain(ids).logits).std() / plain(ids).logits.std()
    assert 0 < apart < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nonsense": 1}, "no argument 'nonsense'; leave it out"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation='flash_attention_2' is not supp"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported"),
        ({"dtype": "float64"}, "dtype 'float64' is unknown"),
        ({"dtype": 16}, "dtype 16 is unknown"),
        ({"device_map": "tpu"}, "device 'tpu' is unknown"),
        ({"device_map": "meta"}, "device 'meta' is unknown"),
        ({"device_map": "cuda:99"}, "device 'cuda:99' is asked for"),
        ({"device_map": {"": 99}}, "device 'cuda:99' is asked for"),
        ({"device_map": {"model": 0, "lm_head": 1}}, "a map of modules is not there yet"),
    ],
)
def test_what_cannot_be_done_is_refused(checkpoint: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(checkpoint, **options)
    assert "\n" not in str(caught.value)


def test_an_unknown_argument_of_the_tokenizer_is_refused(checkpoint: Path) -> None:
    with pytest.raises(RequestError, match="no argument 'nonsense'"):
        AutoTokenizer.from_pretrained(checkpoint, nonsense=True)
    with pytest.raises(RequestError, match="padding_side='right' is not supported"):
        AutoTokenizer.from_pretrained(checkpoint, padding_side="right")


def test_what_scripts_state_without_meaning_anything_is_accepted(checkpoint: Path) -> None:
    AutoTokenizer.from_pretrained(checkpoint, use_fast=True, padding_side="left", revision="main")
    options = {"attn_implementation": "sdpa", "low_cpu_mem_usage": True, "quantization_config": None}
    assert AutoModelForCausalLM.from_pretrained(checkpoint, use_safetensors=True, **options) is not None


def test_trust_remote_code_is_announced_and_runs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_language_model().save_pretrained(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "modeling_evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((tmp_path / name).read_text())
        config["auto_map"] = {
            "AutoModelForCausalLM": "modeling_evil.Evil",
            "AutoTokenizer": "modeling_evil.Evil",
        }
        (tmp_path / name).write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
        AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    loud = [r for r in caplog.records if "never runs code from a checkpoint" in r.getMessage()]
    assert len(loud) == 2
    assert type(model) is LanguageModel
    assert not ran.exists()
    assert not any("modeling_evil" in name for name in sys.modules)


def test_the_folder_of_a_run_is_not_its_snapshot(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / f"step-000000{step}").mkdir()
        (tmp_path / f"step-000000{step}" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is the folder of a run; name a snapshot: .*step-0000002$"):
        glm5.load(tmp_path)


def test_weights_past_all_memory_are_refused_with_numbers(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"SC_PHYS_PAGES": 100, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr("glm5.hub.os.sysconf", sizes.__getitem__)
    with pytest.raises(
        CheckpointError,
        match=r"weights take .* GB and .* of cache .* GB; this machine has 0\.0 GB of memory; load_in",
    ):
        glm5.load(checkpoint, device="cpu")


def test_what_is_no_directory_is_named(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        glm5.load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"is a file; name the directory that holds config\.json"):
        glm5.load(checkpoint / "config.json")
    (tmp_path / "MODEL.GGUF").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"is a GGUF file; .* glm5 quantize /.*/MODEL\.GGUF DIRECTORY"):
        glm5.load(tmp_path / "MODEL.GGUF")
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        glm5.load(tmp_path)


def test_a_name_too_long_is_one_line() -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        resolve("x" * 5000)


@pytest.mark.parametrize("path", ["./absent", "../absent", "a/b/c", "absent", "~/absent"])
def test_a_path_is_never_taken_for_a_hub_name(path: str) -> None:
    with pytest.raises(CheckpointError, match=r"no such directory$"):
        resolve(path)


def test_a_hub_name_without_network_is_one_line(tmp_path: Path) -> None:
    code = "from glm5.hub import resolve; resolve('nobody/nothing')"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("glm5.errors.CheckpointError: nobody/nothing: no such directory here, and the hub")
    assert "(HF_HUB_OFFLINE is set, and it was not fetched before)" in last
    assert len(last) < 400
    with pytest.raises(CheckpointError, match="the model's name is empty"):
        glm5.load("")


# --- saving ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "defaults",
    [SamplingParams(), SamplingParams(temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05)],
)
def test_a_saved_model_comes_back_whole(tmp_path: Path, defaults: SamplingParams) -> None:
    model = tiny_language_model()
    model.defaults = defaults
    model.save_pretrained(tmp_path / "new")
    again = glm5.load(tmp_path / "new")
    assert again.defaults == defaults
    assert again.config.eos_token_ids == model.config.eos_token_ids
    assert (
        again.tokenizer is not None and again.tokenizer.backend.to_str() == model.tokenizer.backend.to_str()
    )
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    raw = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert raw["do_sample"] is (defaults.temperature > 0)
    assert raw["eos_token_id"] == list(model.config.eos_token_ids)


# --- text ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["The quick", TALK])
def test_streamed_pieces_are_the_completion(model: LanguageModel, prompt: Any) -> None:
    done: list[Result] = []
    pieces = list(model.stream(prompt, max_new_tokens=12, ignore_eos=True, on_finish=done.append))
    (completion,) = done
    assert "".join(pieces) == completion.text == small_tokenizer().decode(completion.ids)
    assert (len(completion.ids), completion.finish_reason) == (12, "length")
    assert completion.prompt_tokens == len(model.prompt_ids(prompt))
    assert model.complete(prompt, max_new_tokens=12, ignore_eos=True) == completion
    plain = model.complete(prompt, max_new_tokens=12, ignore_eos=True, use_mtp=False)
    assert plain == completion


@pytest.mark.parametrize("use_mtp", [True, False])
def test_a_stop_string_ends_the_text(model: LanguageModel, use_mtp: bool) -> None:
    free = model.complete("The quick", max_new_tokens=16, ignore_eos=True)
    stop = free.text[4:6]
    cut = model.complete("The quick", max_new_tokens=16, ignore_eos=True, stop=stop, use_mtp=use_mtp)
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.ids == free.ids[: len(cut.ids)]
    assert len(cut.ids) < 16


def test_an_end_token_is_among_the_ids_and_not_in_the_text(model: LanguageModel) -> None:
    free = model.complete("The quick", max_new_tokens=8, ignore_eos=True)
    ended = model.complete("The quick", max_new_tokens=8, stop_token_ids=[free.ids[3]], ignore_eos=True)
    at = free.ids.index(free.ids[3])
    assert ended.ids == free.ids[: at + 1]
    assert ended.text == small_tokenizer().decode(free.ids[:at])
    assert ended.finish_reason == "stop"


def test_a_bad_request_is_refused_before_the_first_piece(model: LanguageModel) -> None:
    for options in ({"topp": 1}, {"temperature": -1}, {"num_draft_tokens": 0}):
        with pytest.raises(RequestError):
            model.stream("The quick", **options)
    with pytest.raises(TemplateError):
        model.stream([{"role": "nobody", "content": "x"}])
