"""Hand-written material of the chat tasks: small talk, everyday words, popular library functions.

The lists are data (`wordlists.json`); how rows are made of them is in `tasks`. What the model says of itself
stays honest.
"""

from __future__ import annotations

import json
from pathlib import Path

_LISTS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
# Words that a learner asks for first, with the meaning that is meant: always in the dictionary
# task, and the Chinese answer for their English word.
CORE_WORDS: dict[str, str] = _LISTS["core_words"]
# What a function's page says in a sentence, where its docstring does not.
DOC_SENTENCES: dict[str, str] = _LISTS["doc_sentences"]
# Module to the names of its functions that are asked about.
LIBRARY: dict[str, str] = _LISTS["library"]
# (ways to say it, the answer)
SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = tuple(
    (tuple(ask), answer) for ask, answer in _LISTS["small_talk"]
)
