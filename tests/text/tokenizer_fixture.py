"""A small trained tokenizer and generated conversations, for the tests of text and chat.

The conversations are OpenAI messages with everything the formats treat differently: unicode,
control-token spellings, reasoning in either place, tool calls, grouped results, null contents.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from glm5.text.chat.template import default_template
from glm5.text.control_tokens import SPECIAL_TOKENS
from glm5.text.tokenizer import Tokenizer

# Flagged "special": false in the published tokenizers, though they are control tokens.
NOT_FLAGGED = tuple(token for token in SPECIAL_TOKENS if re.search("think|tool|arg_", token))

_CORPUS = (
    "The quick brown fox jumps over the lazy dog. Call the tool with city and celsius.",
    "You may call one or more functions to assist with the user query. user system assistant",
    "人工智能可以帮助人们写作、翻译和编程。北京今天天气很好。",
    'def f(x):\n    return x + 1\n\n12345 67890 3.14 <b>bold</b> {"a": [1, 2, 3]}',
)


@cache
def backend_json() -> str:
    """tokenizer.json of a byte-level BPE of about 600 entries, flags as in published files."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS * 5, trainer)
    for token in SPECIAL_TOKENS:
        flagged = token not in NOT_FLAGGED
        backend.add_tokens([tokenizers.AddedToken(token, special=flagged, normalized=False)])
    return backend.to_str()


@cache
def small_tokenizer(**options: Any) -> Tokenizer:
    """A Tokenizer over the small BPE; `options` as for Tokenizer, GLM-5 by default."""
    if not options:
        options = {"chat_template": default_template()}
    return Tokenizer(tokenizers.Tokenizer.from_str(backend_json()), **options)


# --- conversations ---------------------------------------------------------------------------

_FRAGMENTS = [
    "hello", "Weather in Oslo?", "12345", "你好，世界", "é", "👩‍🚀", "\u2028", "\x00", "None",
    " ", "  ", "\n", "\n\n", "\t", '"', "\\", "{{ x }}", "{% raw %}", "&amp;", "/nothink",
]  # fmt: skip
CONTROL_FRAGMENTS = [*SPECIAL_TOKENS, "<|", "user", "|>", "<", "think", ">", "</"]

# Text that spells no control token, and text that likely does.
plain_text = st.lists(st.sampled_from(_FRAGMENTS), max_size=4).map("".join)
hostile_text = st.lists(st.sampled_from(_FRAGMENTS + CONTROL_FRAGMENTS), max_size=5).map("".join)

_names = st.sampled_from(["get_weather", "search", "run", "Über", "a.b-c"])
_keys = st.sampled_from(["city", "days", "q", "ключ", "deep"])


def _values(text: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.one_of(
        text,
        st.sampled_from([None, True, 0, -7, 2.5, 10**20, [], {}, [1, "é"], {"k": [None, "x"]}]),
    )


@st.composite
def tool_lists(draw: st.DrawFn, text: st.SearchStrategy[str] = plain_text) -> list[dict[str, Any]]:
    """OpenAI tools, with and without the keys that later dialects drop."""
    tools = []
    for _ in range(draw(st.integers(0, 2))):
        function = {
            "name": draw(_names),
            "description": draw(text),
            "parameters": {"type": "object", "properties": {draw(_keys): {"type": "string"}}},
        }
        if draw(st.booleans()):
            function["strict"] = draw(st.booleans())
        tools.append({"type": "function", "function": function})
    return tools


@st.composite
def conversations(
    draw: st.DrawFn,
    text: st.SearchStrategy[str] = hostile_text,
    *,
    answer: st.SearchStrategy[str] | None = None,
) -> list[dict[str, Any]]:
    """One to about ten messages in any order a client may send.

    `answer` is the content of assistant turns that give no reasoning_content.
    """
    messages: list[dict[str, Any]] = []
    roles = st.sampled_from(["user", "user", "assistant", "assistant", "call", "system"])
    for role in draw(st.lists(roles, min_size=1, max_size=6)):
        if role in ("user", "system"):
            messages.append({"role": role, "content": _content(draw, text)})
            continue
        reasoning = draw(st.sampled_from(["absent", "null", "text", "text"]))
        raw = answer is not None and reasoning != "text"
        turn: dict[str, Any] = {"role": "assistant", "content": draw(answer if raw else text)}
        if reasoning != "absent":
            turn["reasoning_content"] = draw(text) if reasoning == "text" else None
        messages.append(turn)
        if role == "call":
            messages += _calls(draw, turn, text)
    return messages


def _content(draw: st.DrawFn, text: st.SearchStrategy[str]) -> Any:
    whole = draw(text)
    form = draw(st.sampled_from(["string", "string", "parts", "strings"]))
    if form == "string":
        return whole
    halves = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
    return halves if form == "strings" else [{"type": "text", "text": half} for half in halves]


def _calls(draw: st.DrawFn, turn: dict[str, Any], text: st.SearchStrategy[str]) -> list[dict[str, Any]]:
    """Give `turn` tool calls, and return the results that follow it."""
    if draw(st.booleans()):
        turn["content"] = None
    calls, results = [], []
    for index in range(draw(st.integers(1, 3))):
        arguments: Any = draw(st.dictionaries(_keys, _values(text), max_size=2))
        if draw(st.booleans()):
            arguments = json.dumps(arguments, ensure_ascii=draw(st.booleans()))
        function = {"name": draw(_names), "arguments": arguments}
        calls.append({"id": f"call_{index}", "type": "function", "function": function})
        results.append({"role": "tool", "tool_call_id": f"call_{index}", "content": draw(text)})
    turn["tool_calls"] = calls
    results = draw(st.permutations(results))
    return list(results[: draw(st.integers(0, len(results)))])
