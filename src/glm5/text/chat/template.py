"""Conversations as GLM prompts: our own renderer of the published chat formats, one per dialect.

Knows messages, tools and the frame around them; gives pieces that are either a control token or
plain text, so that nothing a user writes can become a control token. Leaves ids to `tokenizer`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Literal, NamedTuple, get_args

from glm5.errors import TemplateError
from glm5.text.chat.messages import Turn, as_json, check_messages, kind_of
from glm5.text.control_tokens import SPECIAL_TOKENS, THINK_CLOSE, THINK_OPEN

Dialect = Literal["glm4.6", "glm4.7", "glm5", "glm5.1", "glm5.2", "glm5.3"]
DIALECTS: tuple[str, ...] = get_args(Dialect)

# SHA-256 of template text (one trailing newline aside, which jinja2 drops) -> the dialect that
# tests/test_chat_template.py proves to render equally. Any other template goes to the sandbox.
KNOWN_TEMPLATES: dict[str, Dialect] = {
    "e6e2ddfb13f8aef529a869e362f74743725c0919b8675139b93c0cb1623796c8": "glm4.6",
    "d63ad536c3c81880043e22ec7fd08db42b4d8fb7c89c7138bc562bfa25281375": "glm4.7",
    "9ac2c552621220dc64f566acacd844cd1ce484f01b7f7982085226fa0d7bb2e7": "glm5",
}

# A control token in the GLM-4.5..4.6 vocabulary, absent from tokenizers that we train.
SOFT_SWITCH = "/nothink"


class Piece(NamedTuple):
    """A stretch of a prompt: one control token of the frame, or text that is only text."""

    text: str
    control: bool


@dataclass(frozen=True)
class _Rules:
    """Where one dialect differs from the next. Defaults are GLM-5's own."""

    newline: str = ""  # GLM-4.6 puts one after each role token and between parts of a call
    soft_switch: bool = False  # thinking off also ends every user turn with /nothink
    think_prompt: str = THINK_OPEN
    no_think_prompt: str = THINK_CLOSE
    unshown: str = THINK_CLOSE  # stands where a turn's reasoning would be
    unshown_latest: str = THINK_CLOSE  # the same after the last user message, thinking on
    always_clears: bool = False  # GLM-4.6 has no clear_thinking
    clears_by_default: bool = True
    strips_reasoning: bool = True
    unwraps_tools: bool = False  # {type, function} -> the function alone, without internal keys
    efforts: tuple[str, ...] = ()  # accepted names; any other means "max"; () has no effort line
    always_thinks: bool = False
    orders_results: bool = False  # tool results in the order of the calls, by id


_EMPTY_THOUGHT = THINK_OPEN + THINK_CLOSE
_GLM5 = _Rules()
_GLM51 = replace(_GLM5, unshown_latest=_EMPTY_THOUGHT, unwraps_tools=True)
# Less certain than the rows above: 5.2 is put together from reports about its template, 5.3 is
# proven against PyPI `renderers` only. Neither is in KNOWN_TEMPLATES.
_GLM52 = replace(
    _GLM51,
    no_think_prompt=_EMPTY_THOUGHT,
    unshown=_EMPTY_THOUGHT,
    strips_reasoning=False,
    efforts=("high",),
)
_GLM53 = replace(
    _GLM52,
    clears_by_default=False,
    efforts=("low", "high"),
    always_thinks=True,
    orders_results=True,
)
_RULES: dict[str, _Rules] = {
    "glm4.6": _Rules(
        newline="\n",
        soft_switch=True,
        think_prompt="",
        no_think_prompt="\n" + _EMPTY_THOUGHT,
        unshown=_EMPTY_THOUGHT,
        unshown_latest=_EMPTY_THOUGHT,
        always_clears=True,
    ),
    "glm4.7": _GLM5,
    "glm5": _GLM5,
    "glm5.1": _GLM51,
    "glm5.2": _GLM52,
    "glm5.3": _GLM53,
}

_CONTROL = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS))
# Keys of a tool that steer the server, not the model (GLM-5.1 on).
_SERVER_KEYS = ("defer_loading", "strict")


def render(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    dialect: Dialect,
    add_generation_prompt: bool = True,
    enable_thinking: bool = True,
    clear_thinking: bool | None = None,
    reasoning_effort: str | None = None,
) -> list[Piece]:
    """Render a conversation as the pieces of a prompt.

    `messages` are OpenAI chat messages (system or developer, user, assistant, tool; content as
    a string or text parts; tool calls with arguments as a mapping or JSON text). `tools` are
    OpenAI tools. `clear_thinking` None means the dialect's own habit: reasoning of turns before
    the last user message is dropped up to GLM-5.2 and kept from 5.3. `reasoning_effort` counts
    from 5.2 on; like the published templates, an unknown name means the highest.

    Three differences from the published templates, all on purpose: contents never yield control
    tokens; a null assistant content is empty, not the word "None"; parts that are not text are
    refused, not dropped. Raises TemplateError naming the message and the key.
    """
    if dialect not in _RULES:
        raise TemplateError(f"chat dialect {dialect!r} is unknown; known: {', '.join(DIALECTS)}")
    if reasoning_effort is not None and not isinstance(reasoning_effort, str):
        raise TemplateError(f"reasoning_effort must be a string, not {reasoning_effort!r}")
    rules = _RULES[dialect]
    turns = check_messages(messages)
    thinking = enable_thinking or rules.always_thinks
    clears = rules.clears_by_default if clear_thinking is None else clear_thinking
    last_user = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=-1)

    out = _Writer(rules)
    out.frame("[gMASK]<sop>")
    if rules.efforts and thinking:
        effort = reasoning_effort if reasoning_effort in rules.efforts else "max"
        out.frame(f"<|system|>Reasoning Effort: {effort.capitalize()}")
    if tools:
        out.tools(tools)
    index = 0
    while index < len(turns):
        turn = turns[index]
        if turn.role == "system":
            out.frame("<|system|>" + rules.newline)
            out.text(turn.content)
        elif turn.role == "user":
            out.user(turn, thinking=thinking)
        elif turn.role == "assistant":
            in_progress = index > last_user
            out.assistant(
                turn,
                keeps_reasoning=in_progress or not (clears or rules.always_clears),
                unshown=rules.unshown_latest if in_progress and thinking else rules.unshown,
            )
        else:
            end = index
            while end < len(turns) and turns[end].role == "tool":
                end += 1
            results = turns[index:end]
            if rules.orders_results and index:
                results = _in_call_order(results, turns[index - 1])
            out.tool_results(results)
            index = end
            continue
        index += 1
    if add_generation_prompt:
        out.frame("<|assistant|>" + (rules.think_prompt if thinking else rules.no_think_prompt))
    return out.pieces


def pieces_to_text(pieces: Iterable[Piece]) -> str:
    """The prompt as one string, as a template engine would have written it."""
    return "".join(piece.text for piece in pieces)


def template_sha256(template: str) -> str:
    """Hash of a template, one trailing newline aside: jinja2 drops it, editors add it."""
    return hashlib.sha256(template.removesuffix("\n").encode("utf-8", "surrogatepass")).hexdigest()


def known_dialect(template: str) -> Dialect | None:
    """The dialect that renders exactly like `template`, or None when that is not proven."""
    return KNOWN_TEMPLATES.get(template_sha256(template))


def default_template() -> str:
    """The Jinja template we ship in checkpoints of our own: the GLM-5 dialect."""
    return resources.files("glm5.text.chat").joinpath("templates/glm5.jinja").read_text(encoding="utf-8")


class _Writer:
    """Collects pieces; text and newlines that touch become one piece, as BPE must see them."""

    def __init__(self, rules: _Rules) -> None:
        self.rules = rules
        self.pieces: list[Piece] = []

    def frame(self, text: str) -> None:
        """Write our own words: control tokens in them are control tokens."""
        position = 0
        for match in _CONTROL.finditer(text):
            self.text(text[position : match.start()])
            self.pieces.append(Piece(match.group(), True))
            position = match.end()
        self.text(text[position:])

    def text(self, text: str) -> None:
        """Write someone else's words: text whatever they say."""
        if not text:
            return
        if self.pieces and not self.pieces[-1].control:
            text = self.pieces.pop().text + text
        self.pieces.append(Piece(text, False))

    def tools(self, tools: Sequence[Mapping[str, Any]]) -> None:
        # The wording is part of the wire format: the models were trained on exactly this.
        newline = self.rules.newline
        self.frame(
            "<|system|>\n# Tools\n\n"
            "You may call one or more functions to assist with the user query.\n\n"
            "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        )
        for index, tool in enumerate(tools):
            line = _tool_line(tool, f"tools[{index}]", unwrap=self.rules.unwraps_tools)
            self.text(line + "\n" if line else "")
        pairs = newline.join(
            f"<arg_key>{{arg-key-{n}}}</arg_key>{newline}<arg_value>{{arg-value-{n}}}</arg_value>"
            for n in (1, 2)
        )
        self.frame(
            "</tools>\n\nFor each function call, output the function name and arguments within "
            "the following XML format:\n"
            f"<tool_call>{{function-name}}{newline}{pairs}{newline}...{newline}</tool_call>"
        )

    def user(self, turn: Turn, *, thinking: bool) -> None:
        self.frame("<|user|>" + self.rules.newline)
        if not self.rules.soft_switch:
            self.text(turn.content)
            return
        # Typed by the user, the switch works as it is meant to: the one control token of this vocabulary that
        # a message may hold. Who typed it gets one, not two.
        content = turn.content if thinking else turn.content.removesuffix(SOFT_SWITCH) + SOFT_SWITCH
        for index, part in enumerate(content.split(SOFT_SWITCH)):
            if index:
                self.pieces.append(Piece(SOFT_SWITCH, True))
            self.text(part)

    def assistant(self, turn: Turn, *, keeps_reasoning: bool, unshown: str) -> None:
        newline = self.rules.newline
        reasoning, content = self._split_reasoning(turn)
        self.frame("<|assistant|>" + newline)
        if keeps_reasoning and reasoning:
            self.frame(THINK_OPEN)
            self.text(reasoning.strip() if self.rules.strips_reasoning else reasoning)
            self.frame(THINK_CLOSE)
        else:
            self.frame(unshown)
        if content.strip():
            self.text(newline + content.strip())
        for call in turn.tool_calls:
            self.frame(newline + "<tool_call>")
            self.text(call.name + newline)
            for key, value in call.arguments.items():
                self.frame("<arg_key>")
                self.text(key)
                self.frame(f"</arg_key>{newline}<arg_value>")
                self.text(value if isinstance(value, str) else as_json(value, "arguments"))
                self.frame("</arg_value>" + newline)
            self.frame("</tool_call>")

    def _split_reasoning(self, turn: Turn) -> tuple[str, str]:
        """Reasoning and answer; raw model output in `content` is split at its `</think>`."""
        if turn.reasoning is not None or THINK_CLOSE not in turn.content:
            return turn.reasoning or "", turn.content
        parts = turn.content.split(THINK_CLOSE)
        reasoning = parts[0].rstrip("\n").split(THINK_OPEN)[-1].lstrip("\n")
        if not self.rules.strips_reasoning:
            reasoning = reasoning.strip()
        return reasoning, parts[-1].lstrip("\n")

    def tool_results(self, results: Sequence[Turn]) -> None:
        newline = self.rules.newline
        self.frame("<|observation|>")
        for result in results:
            self.frame(f"{newline}<tool_response>{newline}")
            self.text(result.content)
            self.frame(f"{newline}</tool_response>")


def _tool_line(tool: Any, where: str, *, unwrap: bool) -> str:
    """The JSON line of one tool; empty for a tool that is to be loaded later (5.1 on)."""
    if not isinstance(tool, Mapping):
        raise TemplateError(f"{where}: must be an object, not {kind_of(tool)}")
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise TemplateError(f"{where}.function.name: must be a string")
    if not unwrap:
        return as_json(tool, where)
    if tool.get("defer_loading") or function.get("defer_loading"):
        return ""
    return as_json({k: v for k, v in function.items() if k not in _SERVER_KEYS}, where)


def _in_call_order(results: list[Turn], caller: Turn) -> list[Turn]:
    """Results in the order of the calls they answer, when the ids pair up without doubt."""
    wanted = [call.call_id for call in caller.tool_calls]
    given = {result.call_id: result for result in results}
    one_to_one = len(set(wanted)) == len(wanted) and len(given) == len(results)
    if None in wanted or None in given or not one_to_one or set(wanted) != set(given):
        return results
    return [given[call_id] for call_id in wanted]
