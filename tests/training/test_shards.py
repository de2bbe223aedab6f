"""Tokenizer training and shards: what goes in comes out, with licences, and only once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glm5.errors import TokenizerError, TrainingError
from glm5.text.bpe import train_bpe
from glm5.text.control_tokens import ENDOFTEXT, SPECIAL_TOKENS, USER
from glm5.training.corpus import Corpus
from glm5.training.shards import build_shards, encode_row, open_shards, sample_texts
from tests.training.corpus_fixture import write_corpus


def test_bpe_has_the_glm_layout(tmp_path: Path) -> None:
    corpus = Corpus(write_corpus(tmp_path / "corpus"))
    tokenizer = train_bpe(sample_texts(corpus, 10), 400)
    assert tokenizer.vocab_size == 400
    first = 400 - len(SPECIAL_TOKENS)
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(first, 400))
    text = "fox 12345 第三只狐狸\n\n  def f(x): 'll"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("1234567")) >= 3  # digits in groups of at most three


def test_bpe_refuses_too_little_text() -> None:
    with pytest.raises(TokenizerError, match="asks for 5000"):
        train_bpe(["a b c"], 5000)


def test_shards_hold_the_corpus(tmp_path: Path) -> None:
    corpus = Corpus(write_corpus(tmp_path / "corpus"))
    tokenizer = train_bpe(sample_texts(corpus, 10), 400)
    said: list[str] = []
    infos = build_shards(corpus, tmp_path / "shards", tokenizer, said.append)
    assert len(said) == 3
    for shard in open_shards(tmp_path / "shards", infos, tokenizer.vocab_size):
        rows = [json.loads(line) for line in (corpus.directory / f"{shard.info.source}.jsonl").open()]
        assert len(rows) == shard.info.documents == len(shard.documents)
        assert shard.info.licence == rows[0]["licence"]
        for row, (start, end, prompt) in zip(rows, shard.documents.tolist(), strict=True):
            ids, given = encode_row(row, tokenizer)
            assert shard.tokens[start:end].tolist() == ids
            assert prompt == given
    assert build_shards(corpus, tmp_path / "shards", tokenizer, said.append) == infos
    assert len(said) == 3  # nothing was encoded twice


def test_rows_end_with_the_token_that_ends_them(tmp_path: Path) -> None:
    corpus = Corpus(write_corpus(tmp_path / "corpus"))
    tokenizer = train_bpe(sample_texts(corpus, 10), 400)
    ids, prompt = encode_row({"text": "fox"}, tokenizer)
    assert (ids[-1], prompt) == (tokenizer.control_ids[ENDOFTEXT], 0)
    messages = [{"role": "user", "content": "fox 1?"}, {"role": "assistant", "content": "it jumps"}]
    ids, prompt = encode_row({"messages": messages}, tokenizer)
    assert ids[-1] == tokenizer.control_ids[USER]
    assert ids[:prompt] == tokenizer.apply_chat_template(messages[:1], enable_thinking=False)
    assert tokenizer.decode(ids[prompt:-1]) == "it jumps"


@pytest.mark.parametrize("line", ["{", "[]", '{"other": 1}'])
def test_bad_lines_are_named(tmp_path: Path, line: str) -> None:
    corpus = Corpus(write_corpus(tmp_path / "corpus"))
    tokenizer = train_bpe(sample_texts(corpus, 10), 400)
    (corpus.directory / "bad.jsonl").write_text('{"text": "fine", "language": "en"}\n' + line + "\n")
    corpus = Corpus(corpus.directory)
    with pytest.raises(TrainingError, match=r"bad.jsonl: line 2 "):
        build_shards(corpus, tmp_path / "shards", tokenizer, lambda message: None)
    assert not list((tmp_path / "shards").glob("bad.*"))


def test_an_empty_corpus_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"recipes.nano.build"):
        Corpus(tmp_path)
