"""What a line that begins with / does in a chat, on a terminal and in a pipe alike."""

from __future__ import annotations

import difflib
from pathlib import Path

from glm5.cli.conversation import SETTINGS, ChatSession
from glm5.errors import Glm5Error

EXIT_WORDS = ("/exit", "/quit", "/bye")
_HELP = {
    "/help": "this list",
    "/exit": "end (also /quit, /bye, Ctrl-D)",
    "/clear": "forget the conversation (also /reset)",
    "/system [TEXT]": "set the system message; show it without TEXT; /system off takes it away",
    "/think [on|off]": "reason before the answer; without a word the other way round",
    "/reasoning": "show the reasoning of the last answer",
    "/set [NAME VALUE]": "change a sampling parameter, e.g. /set temperature 0.3; show all without a name",
    "/save FILE": "write the conversation",
    "/load FILE": "go on with a written conversation",
}
NAMES = (*EXIT_WORDS, "/reset", "/?", *(line.split()[0] for line in _HELP))


def is_command(text: str) -> bool:
    """A word of letters behind a slash; a path or another text that begins with / is none."""
    first = text.split(maxsplit=1)[0] if text.strip() else ""
    return first == "/?" or (first.startswith("/") and first[1:].isascii() and first[1:].isalpha())


def run_command(session: ChatSession, text: str) -> str | None:
    """Carry out a command; what there is to say, or None to end the chat. Nothing raises."""
    word, _, rest = text.strip().partition(" ")
    word, rest = word.lower(), rest.strip()
    try:
        return _run(session, word, rest)
    except Glm5Error as error:
        return f"error: {error}"
    except OSError as error:
        return f"error: {error.filename or rest}: {error.strerror}"
    except (RuntimeError, ValueError) as error:  # a home that is nobody's, a name with a zero byte
        return f"error: {rest}: {error}"


def _run(session: ChatSession, word: str, rest: str) -> str | None:
    if word in EXIT_WORDS:
        return None
    if word in ("/help", "/?"):
        width = max(map(len, _HELP))
        lines = [f"{name:{width}}  {what}" for name, what in _HELP.items()]
        return "\n".join([*lines, "Ctrl-C stops an answer and keeps it; Alt-Enter begins a new line."])
    if word in ("/clear", "/reset"):
        session.reset()
        return "forgotten: the next message begins a new conversation"
    if word == "/system":
        return _system(session, rest)
    if word == "/think":
        if rest not in ("", "on", "off"):
            return "error: /think on, or /think off"
        session.enable_thinking = not session.enable_thinking if not rest else rest == "on"
        return f"thinking is {'on' if session.enable_thinking else 'off'}"
    if word == "/reasoning":
        return session.last_reasoning.strip() or "the last answer came without reasoning"
    if word == "/set":
        return _set(session, rest)
    if word in ("/save", "/load"):
        if not rest:
            return f"error: {word} needs the name of a file"
        path = Path(rest).expanduser()
        if word == "/save":
            session.save(path)
            return f"written: {path}"
        session.load(path)
        return f"{session.turns} questions and answers are back; the next message goes on from there"
    near = difflib.get_close_matches(word, NAMES, n=1)
    return f"{word} is no command{f'; did you mean {near[0]}?' if near else ''} /help lists them"


def _system(session: ChatSession, rest: str) -> str:
    if rest == "off":
        session.system = ""
    elif rest:
        session.system = rest
    if not session.system:
        return "no system message"
    return f"the system message is: {session.system}"


def _set(session: ChatSession, rest: str) -> str:
    if rest:
        name, _, value = rest.replace("=", " ", 1).partition(" ")
        session.set(name, value.strip())
    defaults = session.model.defaults
    values = [f"{name} {session.params.get(name, getattr(defaults, name))}" for name in SETTINGS]
    return ", ".join(values)
