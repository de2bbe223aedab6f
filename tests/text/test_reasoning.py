"""Reasoning and answer: told apart by the tags, wherever the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm5.text.chat.reasoning import ReasoningSplit, begins_inside

IDS = {"<think>": 1, "</think>": 2}


def parts(pieces: list[str], inside: bool) -> tuple[str, str]:
    """(reasoning, answer)"""
    split = ReasoningSplit(inside)
    found = [part for piece in pieces for part in split.push(piece)] + list(split.flush())
    return "".join(t for t, r in found if r), "".join(t for t, r in found if not r)


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "answer"),
    [
        ("AB", False, "", "AB"),
        ("rs</think>AB", True, "rs", "AB"),
        ("</think>AB", True, "", "AB"),
        ("<think>rs</think>AB", False, "rs", "AB"),
        ("\n<think>rs</think>\nAB", False, "rs", "\nAB"),
        ("A <think> B", False, "", "A <think> B"),
        ("r</think>A</think>B<think>C", True, "r", "A</think>B<think>C"),
        ("never closed", True, "never closed", ""),
        ("<think>rs</think>AB", True, "rs", "AB"),
        ("  <thin", False, "", "  <thin"),
        ("r</thi", True, "r</thi", ""),
        ("", True, "", ""),
    ],
)
def test_each_part_is_what_the_tags_say(text: str, inside: bool, reasoning: str, answer: str) -> None:
    assert parts([text], inside) == (reasoning, answer)
    assert parts(list(text), inside) == (reasoning, answer)


WORDS = ["<think>", "</think>", "a", " ", "\n", "<", "<t", "</", "think>"]


@given(st.lists(st.sampled_from(WORDS)), st.booleans(), st.lists(st.integers(1, 5)))
def test_where_a_text_is_cut_does_not_matter(words: list[str], inside: bool, cuts: list[int]) -> None:
    text = "".join(words)
    pieces, at = [], 0
    for cut in cuts:
        pieces.append(text[at : at + cut])
        at += cut
    pieces.append(text[at:])
    assert parts(pieces, inside) == parts([text], inside)


@pytest.mark.parametrize(
    ("ids", "inside"),
    [([], False), ([5, 1], True), ([1, 5, 2, 7], False), ([1, 2, 9, 1, 7], True), ([7], False)],
)
def test_a_prompt_ends_inside_where_its_last_tag_opens(ids: list[int], inside: bool) -> None:
    assert begins_inside(ids, IDS) is inside
    assert not begins_inside(ids, {})
