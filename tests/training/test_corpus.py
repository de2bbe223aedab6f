"""Corpora of one's own: text files, JSON lines, what is held out, and every fault by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glm5.errors import TrainingError
from glm5.text.bpe import train_bpe
from glm5.text.control_tokens import OBSERVATION, USER
from glm5.training.corpus import SHIPPED, Corpus, language_of, read
from glm5.training.loop import Trainer
from glm5.training.shards import build_shards, encode_chat, sample_texts
from tests.training.corpus_fixture import tiny_recipe


def rows(*values: object) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def test_a_text_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {n} of the book. " * 20 for n in range(30)]
    file = tmp_path / "book.txt"
    file.write_text("\ufeff" + "\n\n".join(paragraphs) + "\n", encoding="utf-8")
    documents = list(read(file))
    assert len(documents) > 5
    assert all(len(document.text or "") >= 1200 for document in documents[:-1])
    joined = "".join(document.text or "" for document in documents)
    assert joined.replace("\n", "").replace(" ", "") == "".join(paragraphs).replace(" ", "")


def test_one_in_fifty_is_held_out_and_never_taught(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(rows(*({"text": f"document {n}"} for n in range(200))))
    corpus = Corpus(tmp_path)
    taught = {document.text for document in corpus.documents(corpus.files[0])}
    held = {text for texts in corpus.heldout().values() for text in texts}
    assert len(held) == 4
    assert not taught & held
    assert len(taught | held) == 200


@pytest.mark.parametrize("count", [2, 3, 49, 50, 51])
def test_a_small_file_still_has_something_to_hold_out(tmp_path: Path, count: int) -> None:
    (tmp_path / "a.jsonl").write_text(rows(*({"text": f"document {n}"} for n in range(count))))
    corpus = Corpus(tmp_path)
    held = [text for texts in corpus.heldout().values() for text in texts]
    assert len(held) == 1
    assert len(list(corpus.documents(corpus.files[0]))) == count - 1


def test_a_run_on_own_text_files(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("\n\n".join(f"The fox number {n} jumps over hill {n * 3}. " * 12
                                                  for n in range(60)))  # fmt: skip
    recipe = tiny_recipe(
        tmp_path,
        data__corpus=folder,
        data__stages=[{"mix": {"en": 1.0}}],
        run__steps=2,
        run__eval_rows=1,
        tokenizer__vocab_size=380,
    )
    assert Trainer(recipe).train().name == "step-0000002"


def test_the_shipped_corpus_trains_a_tokenizer(tmp_path: Path) -> None:
    corpus = Corpus(Path(SHIPPED))
    tokenizer = train_bpe(sample_texts(corpus, 4), 512)
    infos = build_shards(corpus, tmp_path, tokenizer, lambda line: None)
    assert [info.source for info in infos] == ["default"]
    assert infos[0].tokens > 5000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\n", "line 1 is not UTF-8 at byte 0"),
        (b"[1]\n", "line 1 has neither text nor messages"),
        (b'{"text": ""}\n', "line 1: text is ''"),
        (b'{"text": 5}\n', "line 1: text is 5"),
        (b'{"text": "\\ud800"}\n', "line 1 has a lone surrogate"),
        (b'{"text": "a", "language": "\\ud800"}\n', "line 1 has a lone surrogate"),
        (b'{"messages": [{"role": "assistant", "content": "b"}]}\n', "line 1: needs at least two messages"),
        (b'{"text": "a", "language": 3}\n', "line 1: language is 3"),
        (
            b'{"text": "a"}\n'
            b'{"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}\n',
            "line 2 is a chat among",
        ),
        (
            b'{"messages": [{"role": "user", "content": "b"}, {"role": "user", "content": "c"}]}\n',
            "last message must be the assistant's",
        ),
        (b'{"messages": [{"role": "wizard", "content": "b"}]}\n', "messages[0].role"),
        (b"", "holds no documents"),
    ],
)
def test_faults_are_named_by_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    with pytest.raises(TrainingError) as error:
        list(read(file))
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)


def test_a_text_file_of_another_encoding_is_named(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(TrainingError, match=r"latin\.txt: line 2 is not UTF-8 at byte 3"):
        list(read(file))


def test_two_sources_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.jsonl").write_text("x")
    with pytest.raises(TrainingError, match="two sources named 'a'"):
        Corpus(tmp_path)


def test_the_language_of_a_text() -> None:
    assert language_of("北京今天天气很好 (weather)") == "zh"
    assert language_of("The weather in 北京 is fine today") == "en"


def test_a_chat_ends_with_the_token_that_gives_the_turn_back(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(
        (
            "get_weather city Beijing the user asks what a fox, a hill, an owl and the moon would say: "
            "quickly jumping over seventeen lazy dogs by night. "
        )
        * 20
    )
    tokenizer = train_bpe(sample_texts(Corpus(tmp_path), 1), 340)
    ask = {"role": "user", "content": "weather?"}
    function = {"name": "get_weather", "arguments": {"city": "Beijing"}}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}
    ids, prompt = encode_chat([ask, call], tokenizer)
    assert ids[-1] == tokenizer.control_ids[OBSERVATION]
    assert prompt < len(ids)
    ids, _ = encode_chat([ask, {"role": "assistant", "content": "fine"}], tokenizer)
    assert ids[-1] == tokenizer.control_ids[USER]


def test_another_corpus_gets_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, run__steps=1)
    first = Trainer(recipe).tokenizer
    assert Trainer(recipe).tokenizer.backend.to_str() == first.backend.to_str()
    file = recipe.data.corpus / "english.jsonl"
    file.write_text(file.read_text().replace("lazy dog", "weary hedgehog of Sussex"))
    assert Trainer(recipe).tokenizer.backend.to_str() != first.backend.to_str()
