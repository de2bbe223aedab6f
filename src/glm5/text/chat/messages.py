"""Chat messages as people send them: OpenAI's shape, checked, every fault named by message and key."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glm5.errors import TemplateError
from glm5.text.control_tokens import THINK_CLOSE, THINK_OPEN

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class ToolCall:
    """One function call of an assistant turn, its arguments parsed."""

    name: str
    arguments: dict[str, Any]
    call_id: str | None = None


@dataclass(frozen=True)
class Turn:
    """One checked message: text content, known role, parsed tool calls."""

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    call_id: str | None = None


def check_messages(messages: Any) -> list[Turn]:
    """Check OpenAI chat messages and read them into turns; TemplateError names what is wrong."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TemplateError(f"messages: must be a list, not {kind_of(messages)}")
    if not messages:
        raise TemplateError("messages: the list is empty; give at least one message")
    return [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _check_message(message: Any, where: str) -> Turn:
    if not isinstance(message, Mapping):
        raise TemplateError(f"{where}: must be an object with a role, not {kind_of(message)}")
    role = message.get("role")
    if role == "developer":  # OpenAI's newer name for the same thing
        role = "system"
    if role not in _ROLES:
        raise TemplateError(f"{where}.role: {role!r} is unknown; use {', '.join(_ROLES)}")
    content = message.get("content")
    if role != "assistant":
        call_id = message.get("tool_call_id")
        return Turn(role, _text(content, f"{where}.content"), call_id=_optional_id(call_id, where))
    reasoning = message.get("reasoning_content")
    if reasoning is None and isinstance(message.get("reasoning"), str):
        reasoning = message["reasoning"]  # the newer name of the same field in some servers
    if reasoning is not None and not isinstance(reasoning, str):
        raise TemplateError(f"{where}.reasoning_content: must be a string, not {kind_of(reasoning)}")
    calls = message.get("tool_calls")
    if calls is None:
        calls = []
    if isinstance(calls, (str, bytes, Mapping)) or not isinstance(calls, Sequence):
        raise TemplateError(f"{where}.tool_calls: must be a list, not {kind_of(calls)}")
    return Turn(
        role,
        "" if content is None else _text(content, f"{where}.content"),
        reasoning,
        tuple(_check_call(call, f"{where}.tool_calls[{j}]") for j, call in enumerate(calls)),
    )


def _check_call(call: Any, where: str) -> ToolCall:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise TemplateError(f"{where}: must be an object with a function, not {kind_of(call)}")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise TemplateError(f"{where}.function.name: must be a string that is not empty")
    where = f"{where}.function.arguments"
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}  # a call without arguments, as some clients write it
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise TemplateError(f"{where}: not JSON: {error}") from None
    if not isinstance(arguments, Mapping):
        raise TemplateError(f"{where}: must be a JSON object, not {kind_of(arguments)}")
    if not all(isinstance(key, str) for key in arguments):
        raise TemplateError(f"{where}: every key must be a string")
    as_json(arguments, where)
    return ToolCall(name, dict(arguments), _optional_id(call.get("id"), where))


def _text(content: Any, where: str) -> str:
    """The text of a content: a string, or the joined text parts of a list."""
    if isinstance(content, str):
        return content
    if content is None:
        raise TemplateError(f"{where}: missing or null; only an assistant message may omit it")
    if isinstance(content, (bytes, Mapping)) or not isinstance(content, Sequence):
        raise TemplateError(f"{where}: must be text or text parts, not {kind_of(content)}")
    texts: list[str] = []
    for index, part in enumerate(content):
        text = part
        if isinstance(part, Mapping):
            if part.get("type") != "text":
                raise TemplateError(
                    f"{where}[{index}].type: {part.get('type')!r} is not text; this model reads text only"
                )
            text = part.get("text")
        if not isinstance(text, str):
            raise TemplateError(f"{where}[{index}].text: must be a string, not {kind_of(text)}")
        texts.append(text)
    return "".join(texts)


def _optional_id(value: Any, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TemplateError(f"{where}: a tool call id must be a string, not {kind_of(value)}")
    return value


def as_json(value: Any, where: str) -> str:
    """JSON as the published templates write it: spaces after separators, no ASCII escapes."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise TemplateError(f"{where}: cannot be written as JSON: {error}") from None


def kind_of(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Checked messages in the shape an unknown Jinja template expects.

    Contents are strings, arguments are objects, a null assistant content is empty; keys that we
    do not know stay, since the template may.
    """
    shaped = []
    for message, turn in zip(messages, check_messages(messages), strict=True):
        entry = {**message, "role": turn.role, "content": turn.content}
        if turn.reasoning is not None:
            entry["reasoning_content"] = turn.reasoning
        if turn.tool_calls:
            entry["tool_calls"] = [
                {
                    "id": call.call_id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in turn.tool_calls
            ]
        shaped.append(entry)
    return shaped


def refuse_control_text(value: Any, control_tokens: Iterable[str], where: str) -> None:
    """Raise TemplateError when any string inside `value` holds a control token.

    An unknown template returns one string, in which a control token written by a user cannot be
    told from one of the frame: so it must not get in. An assistant's own content may hold its
    think tags, which templates split.
    """
    if isinstance(value, str):
        for token in control_tokens:
            if token in value:
                raise TemplateError(
                    f"{where}: holds the control token {token!r}, which this checkpoint's "
                    "unknown chat template could not keep apart from its own; remove it"
                )
    elif isinstance(value, Mapping):
        is_assistant = value.get("role") == "assistant"
        own = [token for token in control_tokens if token not in (THINK_OPEN, THINK_CLOSE)]
        for key, item in value.items():
            refuse_control_text(key, control_tokens, f"{where}: a key")
            allowed = own if is_assistant and key == "content" else control_tokens
            refuse_control_text(item, allowed, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            refuse_control_text(item, control_tokens, f"{where}[{index}]")
