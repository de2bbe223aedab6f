"""A chat template that no dialect is proven to equal: the checkpoint's own text, run in the sandbox."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from glm5.text.chat.messages import refuse_control_text, template_messages
from glm5.text.chat.sandbox import render_unknown
from glm5.text.chat.template import SOFT_SWITCH, Piece


def render_own(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    options: Mapping[str, Any],
    *,
    control_tokens: Iterable[str],
    source: str,
) -> list[Piece]:
    """The pieces of a prompt that `template` writes; `options` are further variables of it.

    Its output is one string: control tokens in it are taken for the frame's. That is why messages and tools
    that spell one are refused. Raises TemplateError, a line that begins with `source` or names the message.
    """
    control_tokens = list(control_tokens)
    shaped = template_messages(messages)
    frame = [token for token in control_tokens if token != SOFT_SWITCH]  # which a user may type
    refuse_control_text(shaped, frame, "messages")
    refuse_control_text(tools, frame, "tools")
    variables = {**options, "messages": shaped, "tools": list(tools) if tools else None}
    return split_control(render_unknown(template, variables, source=source), control_tokens)


def split_control(text: str, control_tokens: Iterable[str]) -> list[Piece]:
    """Text cut at its control tokens, longest first, as the BPE's own matcher prefers them."""
    tokens = sorted(control_tokens, key=len, reverse=True)
    if not tokens:
        return [Piece(text, False)]
    pattern = "(" + "|".join(map(re.escape, tokens)) + ")"
    return [Piece(part, index % 2 == 1) for index, part in enumerate(re.split(pattern, text)) if part]
