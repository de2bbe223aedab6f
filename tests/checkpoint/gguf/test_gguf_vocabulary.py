"""The tokenizer that a GGUF file carries encodes as the one it was converted from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5.checkpoint.gguf import GgufFile, tokenizer_files
from glm5.errors import CheckpointError
from glm5.text.bpe import train_bpe
from glm5.text.tokenizer import Tokenizer
from tests.checkpoint.checkpoint_fixture import refused
from tests.checkpoint.gguf.gguf_fixture import add_key, finish, gguf
from tests.text.tokenizer_fixture import _CORPUS, conversations, hostile_text, small_tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def vocabulary(tokenizer: Tokenizer, pre: str, padding: int = 5) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes for a tokenizer; `padding` rows stay unused."""
    count = tokenizer.vocab_size + padding
    added = tokenizer.backend.get_added_tokens_decoder()
    tokens = [tokenizer.id_to_token(i) or f"[PAD{i}]" for i in range(count)]
    kinds = [UNUSED if tokenizer.id_to_token(i) is None else NORMAL for i in range(count)]
    for i, token in added.items():
        kinds[i] = CONTROL if token.special else USER_DEFINED
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": kinds,
        "merges": [" ".join(pair) for pair in json.loads(tokenizer.backend.to_str())["model"]["merges"]],
        "bos_token_id": tokenizer.control_ids["[gMASK]"],
        "eos_token_id": tokenizer.eos_token_ids[0],
        "eot_token_id": tokenizer.eos_token_ids[1],
        "unknown_token_id": tokenizer.eos_token_ids[0],
        "padding_token_id": tokenizer.pad_token_id,
    }


def write(path: Path, keys: dict[str, Any], template: str | None = None) -> GgufFile:
    writer = gguf.GGUFWriter(path, "glm4moe")
    writer.add_uint32("glm4moe.context_length", 4096)
    for name, value in keys.items():
        if value is not None:
            add_key(writer, f"tokenizer.ggml.{name}", value)
    if template is not None:
        writer.add_string("tokenizer.chat_template", template)
    finish(writer)
    return GgufFile(path)


def rebuilt(file: GgufFile, directory: Path) -> Tokenizer:
    directory.mkdir()
    for name, content in tokenizer_files(file).items():
        (directory / name).write_bytes(content)
    return Tokenizer.from_pretrained(directory)


@pytest.fixture(scope="module", params=["glm4", "chatglm-bpe", "gpt-2"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Tokenizer]:
    """A tokenizer, and the one rebuilt from a GGUF file."""
    wanted = small_tokenizer() if request.param == "gpt-2" else train_bpe(_CORPUS * 5, 420)
    path = tmp_path_factory.mktemp("vocabulary")
    file = write(path / "a.gguf", vocabulary(wanted, request.param), wanted.chat_template)
    return wanted, rebuilt(file, path / "tokenizer")


@settings(deadline=None, max_examples=60)
@given(text=hostile_text | st.text(max_size=30))
def test_texts_encode_and_decode_alike(pair: tuple[Tokenizer, Tokenizer], text: str) -> None:
    wanted, found = pair
    for allow_special in (False, True):
        ids = wanted.encode(text, allow_special=allow_special)
        assert found.encode(text, allow_special=allow_special) == ids
        for skip in (False, True):
            assert found.decode(ids, skip) == wanted.decode(ids, skip)
    assert found.decode(found.encode(text), skip_special_tokens=False) == text


@settings(deadline=None, max_examples=20)
@given(messages=conversations())
def test_chats_render_alike(pair: tuple[Tokenizer, Tokenizer], messages: list[dict[str, Any]]) -> None:
    wanted, found = pair
    assert found.dialect == wanted.dialect is not None
    assert found.apply_chat_template(messages) == wanted.apply_chat_template(messages)


def test_special_tokens_keep_their_roles(pair: tuple[Tokenizer, Tokenizer]) -> None:
    wanted, found = pair
    assert found.control_ids == wanted.control_ids
    assert found.vocab_size == wanted.vocab_size
    assert (found.eos_token_ids, found.pad_token_id) == (wanted.eos_token_ids, wanted.pad_token_id)
    assert found.config["model_max_length"] == 4096


def test_without_token_types_the_named_ids_are_control_tokens(tmp_path: Path) -> None:
    keys = vocabulary(train_bpe(_CORPUS * 5, 420), "glm4", padding=0) | {"token_type": None}
    found = rebuilt(write(tmp_path / "a.gguf", keys), tmp_path / "tokenizer")
    assert set(found.control_ids) == {"<|endoftext|>", "<|user|>", "[gMASK]"}
    assert found.chat_template is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": None}, ["tokenizer.ggml.model", "no vocabulary"]),
        ({"model": "llama"}, ["tokenizer.ggml.model", "'llama'", "gpt2"]),
        ({"pre": "qwen2"}, ["tokenizer.ggml.pre", "'qwen2'", "glm4"]),
        ({"pre": None}, ["tokenizer.ggml.pre", "None"]),
        ({"tokens": None}, ["tokenizer.ggml.tokens", "missing"]),
        ({"tokens": [1, 2, 3, 4]}, ["tokenizer.ggml.tokens", "not a list of texts"]),
        ({"tokens": ["a", "b", "a", "c"]}, ["tokenizer.ggml.tokens", "holds a twice"]),
        ({"token_type": [1, 1]}, ["tokenizer.ggml.token_type", "not a list of 4 numbers"]),
        ({"merges": None}, ["tokenizer.ggml.merges", "missing"]),
        ({"merges": ["ab"]}, ["tokenizer.ggml.merges", "'ab'", "not two tokens"]),
        ({"merges": ["a z"]}, ["tokenizer.ggml.merges", "does not fit the vocabulary"]),
        ({"merges": ["a \x1b"]}, ["tokenizer.ggml.merges", "does not fit the vocabulary"]),
        ({"eos_token_id": 4}, ["tokenizer.ggml.eos_token_id", "not an id below 4"]),
    ],
)
def test_a_broken_vocabulary_is_named(changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    keys = {"model": "gpt2", "pre": "glm4", "tokens": ["a", "b", "ab", "<e>"], "merges": ["a b"]}
    file = write(tmp_path / "a.gguf", keys | changes)
    with refused(CheckpointError, file.path, *words):
        tokenizer_files(file)


def test_a_template_that_is_not_text(tmp_path: Path) -> None:
    file = write(tmp_path / "a.gguf", {"model": "gpt2", "pre": "glm4", "tokens": ["a"], "merges": ["a a"]})
    file.metadata |= {"tokenizer.chat_template": 7, "tokenizer.ggml.merges": []}
    with refused(CheckpointError, file.path, "tokenizer.chat_template", "not text"):
        tokenizer_files(file)


# --- a published file -------------------------------------------------------------------------------

SMOLLM2 = os.environ.get("GLM5_SMOLLM2_GGUF", "")
# What llama.cpp's own tokenizer makes of these texts.
SMOLLM2_IDS = {
    "Hello, world!": [19556, 28, 905, 17],
    "The year 2024 had 366 days.": [504, 713, 216, 34, 32, 34, 36, 761, 216, 35, 38, 38, 2009, 30],
    " naïve café 北京 🦙\n\n  x": [
        15486, 46494, 37366, 13223, 230, 241, 16736, 122, 15107, 116, 243, 8866, 1792,
    ],
    "<|im_start|>": [44, 108, 306, 79, 3738, 108, 46],
}  # fmt: skip


@pytest.mark.skipif(not Path(SMOLLM2).is_file(), reason="GLM5_SMOLLM2_GGUF names no file")
def test_smollm2_reads_as_the_reference_does(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct in Q4_1: 272 tensors of three types, and llama.cpp's own ids."""
    file = GgufFile(SMOLLM2)
    stored = gguf.GGUFReader(SMOLLM2).tensors
    assert {t.name for t in stored} == set(file.tensors)
    for t in stored:
        wanted = torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type)))
        assert torch.equal(file.read(t.name), wanted), t.name

    tokenizer = rebuilt(file, tmp_path / "tokenizer")

    for text, ids in SMOLLM2_IDS.items():
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode("<|im_start|>user\nHi<|im_end|>", allow_special=True) == [1, 4093, 198, 26843, 2]
