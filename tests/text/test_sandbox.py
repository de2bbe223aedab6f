"""Templates that nobody vouches for: right ones render, hostile ones end in one clear line."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jinja2
import pytest

from glm5.errors import TemplateError
from glm5.text.chat.messages import template_messages
from glm5.text.chat.sandbox import Limits, render_unknown
from glm5.text.chat.template import default_template, pieces_to_text, render

QUICK = Limits(seconds=2.0)


@pytest.mark.parametrize("dialect", ["glm4.6", "glm4.7", "glm5"])
def test_published_templates_render_in_the_sandbox_too(dialect: Any) -> None:
    folder = Path(__file__).parents[1] / "oracle" / "templates"
    template = {
        "glm4.6": lambda: (folder / "GLM-4.6.jinja").read_text(encoding="utf-8"),
        "glm4.7": lambda: (folder / "GLM-4.7-Flash.jinja").read_text(encoding="utf-8"),
        "glm5": default_template,
    }[dialect]()
    messages = [
        {"role": "user", "content": "Wetter in Zürich? 🙂"},
        {"role": "assistant", "tool_calls": [{"name": "w", "arguments": '{"city": "Zürich"}'}]},
        {"role": "tool", "content": "12"},
    ]
    tools = [{"type": "function", "function": {"name": "w", "description": "天气"}}]
    variables = {
        "messages": template_messages(messages),
        "tools": tools,
        "add_generation_prompt": True,
    }
    expected = pieces_to_text(render(messages, tools, dialect=dialect))
    assert render_unknown(template, variables) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ x | tojson }}", '{"é": "<\ud800>"}'),
        ("{{ x | tojson(ensure_ascii=True, indent=None) }}", '{"\\u00e9": "<\\ud800>"}'),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% generation %}a{% endgeneration %}b", "ab"),
        ("  {% if true %}\na\n  {% endif %}\nb", "a\nb"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ missing }}", ""),
    ],
)
def test_what_hub_templates_rely_on(template: str, expected: str) -> None:
    assert render_unknown(template, {"x": {"é": "<\ud800>"}}) == expected


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "ran longer than 2 s",
        ),
        ("{{ 9 ** (9 ** 9) }}", "ran longer than 2 s"),
        ("{{ 'a' * 10 ** 10 }}", "needs more than 512 MiB"),
        ("{{ '%9999999999d' % 1 }}", "needs more than 512 MiB"),
        (
            "{% set a = 'a' * 1000000 %}{% for i in range(50) %}{{ a }}{% endfor %}",
            "wrote more than 8 MiB",
        ),
        ("{{ ''.__class__ }}", "line 1: access to '__class__' of a str is unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ x | attr('__class__') }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os }}", "unsafe"),
        ("{{ raise_exception.__globals__ }}", "unsafe"),
        ("{{ '{0.__class__}'.format(x) }}", "unsafe"),
        ("{{ x.update({}) }}", "unsafe"),
        ("{{ range(10 ** 9) }}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", ""),
        ("a\nb\n{{ 1 + }}", "line 3:"),
        ("a\n{{ raise_exception('not\nthis') }}", "line 2: not this"),
        ("a\n\n{{ x.y.z }}", "line 3: 'dict object' has no attribute 'y'"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
        ("{% extends 'x' %}", "no loader"),
    ],
)
def test_hostile_templates_end_in_one_line(template: str, words: str) -> None:
    start = time.monotonic()
    with pytest.raises(TemplateError) as caught:
        render_unknown(template, {"x": {}}, source="mine.jinja", limits=QUICK)
    assert time.monotonic() - start < 4
    assert str(caught.value).startswith("mine.jinja: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_messages_that_are_not_json_are_refused() -> None:
    with pytest.raises(TemplateError, match="not JSON"):
        render_unknown("", {"x": {1}})


def test_the_child_loads_no_torch() -> None:
    # The parent has jinja2 only for this test; the child must not grow by our own imports.
    small = Limits(memory_bytes=64 * 2**20)
    assert jinja2.__version__
    assert render_unknown("{{ 'a' * 1000000 }}", {}, limits=small) == "a" * 1_000_000
    with pytest.raises(TemplateError, match="64 MiB"):
        render_unknown("{{ 'a' * 100000000 }}", {}, limits=small)
