"""Regular expressions out of a `config.json`, run so that none of them can hang a load.

Their meaning is Python's `re.match`. The engine is the Rust one that pydantic carries: its time is
linear in the name, where `re` would need longer than the sun has left for `(a+)+$`. It knows no
look-around; the form that occurs in checkpoints, `^(?!.*experts).*`, is taken apart here.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic_core import SchemaError, SchemaValidator, core_schema

# Published configs have a few dozen, of some 60 characters. The engine takes up to 10 MiB for each.
MAX_PATTERNS = 128
MAX_LENGTH = 400


class NamePattern:
    """A compiled pattern. Raises ValueError, with the reason, when it cannot be one."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise ValueError(f"is longer than {MAX_LENGTH} characters")
        conditions, rest = _split(text)
        self._conditions = [(wanted, _compiled(condition)) for wanted, condition in conditions]
        self._rest = _compiled(rest)

    def matches(self, name: str) -> bool:
        """Whether `name` begins with a match."""
        return self._rest.isinstance_python(name) and all(
            condition.isinstance_python(name) is wanted for wanted, condition in self._conditions
        )


def _compiled(pattern: str) -> SchemaValidator:
    try:
        SchemaValidator(core_schema.str_schema(pattern=pattern))  # "a)(b" would only pass inside a group
        return SchemaValidator(core_schema.str_schema(pattern=rf"\A(?:{pattern})"))
    except (SchemaError, UnicodeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"cannot be used as a pattern ({ascii(reason)[1:-1]})") from None


def _split(pattern: str) -> tuple[list[tuple[bool, str]], str]:
    """Look-aheads at the start, as (whether they must match, pattern), and what follows them."""
    conditions: list[tuple[bool, str]] = []
    rest = pattern
    while (bare := rest.lstrip("^")).startswith(("(?!", "(?=")):
        end = next((at for at, char, depth in _structure(bare) if char == ")" and depth == 0), None)
        if end is None:
            raise ValueError("has an unclosed group")
        conditions.append((bare[2] == "=", bare[3:end]))
        rest = bare[end + 1 :]
    if not conditions:
        return [], pattern
    if rest[:1] in ("*", "+", "?", "{") or any(
        char == "|" and depth == 0 for _, char, depth in _structure(rest)
    ):
        raise ValueError("has a look-ahead that is repeated or stands in one of several alternatives")
    return conditions, rest


def _structure(pattern: str) -> Iterator[tuple[int, str, int]]:
    """Place, character and depth of every `(`, `)` and `|` that is neither escaped nor in a class."""
    depth = at = 0
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            at += 1
        elif char == "[":
            at += 2 if pattern[at + 1 : at + 2] == "^" else 1
            at += 1  # a ] that stands first is a member of the class
            while at < len(pattern) and pattern[at] != "]":
                at += 2 if pattern[at] == "\\" else 1
        elif char in "()|":
            depth -= char == ")"
            yield at, char, depth
            depth += char == "("
        at += 1
