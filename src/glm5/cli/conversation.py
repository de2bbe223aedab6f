"""A conversation with a model: its turns, its settings, and how it is kept in a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glm5.disk.files import write_atomic
from glm5.disk.json_file import read_json
from glm5.errors import Glm5Error, RequestError, TemplateError
from glm5.runtime.language_model import LanguageModel
from glm5.runtime.request import Result
from glm5.runtime.sampling_params import SamplingParams
from glm5.text.chat.reasoning import ReasoningSplit, begins_inside

# What `/set` may change, and how its text is read.
SETTINGS: dict[str, type] = {
    "temperature": float, "top_p": float, "top_k": int, "min_p": float, "repetition_penalty": float,
    "presence_penalty": float, "frequency_penalty": float, "max_new_tokens": int, "seed": int,
}  # fmt: skip


class ChatSession:
    """Holds the messages; `answer` streams the reply to one more user message."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        system: str | None = None,
        enable_thinking: bool | None = None,
        **params: Any,
    ) -> None:
        self.model = model
        self.params = params
        defaults = model.chat_defaults
        self.enable_thinking = defaults.enable_thinking if enable_thinking is None else enable_thinking
        self.remembers = defaults.remembers_turns
        self.system = system or ""
        self._turns: list[dict[str, str]] = []
        self.last: Result | None = None
        self.last_reasoning = ""
        self.forgotten = 0

    def reset(self) -> None:
        """Forget the conversation; system message and settings stay."""
        self._turns = []
        self.last, self.last_reasoning = None, ""

    @property
    def turns(self) -> int:
        """Questions that are remembered."""
        return len(self._turns) // 2

    @property
    def context_tokens(self) -> int:
        """Tokens of the last prompt and its answer."""
        return 0 if self.last is None else self.last.prompt_tokens + len(self.last.ids)

    def answer(self, text: str) -> Iterator[tuple[str, bool]]:
        """Yield (piece, is_reasoning). The turn is remembered once it is complete or stopped.

        Where a conversation outgrows the model, the oldest turns are forgotten (`forgotten` counts them).
        Raises RequestError at once when the message does not fit by itself.
        """
        asked = {"role": "user", "content": text}
        ids = self._fit(asked)
        pieces: list[str] = []
        failed = False
        tokenizer = self.model.tokenizer
        split = ReasoningSplit(begins_inside(ids, tokenizer.control_ids if tokenizer else {}))
        self.last, self.last_reasoning = None, ""
        stream = self.model.stream_chat(ids, on_finish=self._finished, **self.params)
        try:
            for piece, is_reasoning in split.parts(stream):
                if is_reasoning:
                    self.last_reasoning += piece
                else:
                    pieces.append(piece)
                yield piece, is_reasoning
        except Glm5Error:
            failed = True
            raise
        finally:
            stream.close()  # type: ignore[attr-defined]
            if self.remembers and not failed:
                self._turns += [asked, {"role": "assistant", "content": "".join(pieces)}]

    def _messages(self, first: int = 0) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self._turns[first:]]

    def _fit(self, asked: dict[str, str]) -> list[int]:
        """The ids of the prompt, after the oldest turns were forgotten where it leaves no room to answer."""
        limit = self.model.config.max_position_embeddings
        room = min(int(self.params.get("max_new_tokens", 0)), limit // 4)
        ids: list[int] = []
        for first in range(0, len(self._turns) + 1, 2):
            alone = first == len(self._turns)
            try:
                messages = [*self._messages(first), asked]
                ids = self.model.prompt_ids(messages, enable_thinking=self.enable_thinking)
            except TemplateError:  # an answer may spell what an unknown template must not hold
                if alone:
                    raise
                continue
            if len(ids) + room <= limit or (alone and len(ids) < limit):
                self._turns, self.forgotten = self._turns[first:], self.forgotten + first // 2
                break
        return ids  # if nothing helped, the model says how long the whole is

    def _finished(self, result: Result) -> None:
        self.last = result

    # ---------------------------------------------------------------- settings

    def set(self, name: str, value: str) -> None:
        """Change a sampling parameter; `default` goes back to the checkpoint's. Raises RequestError."""
        kind = SETTINGS.get(name)
        if kind is None:
            raise RequestError(f"{name!r} cannot be set; known: {', '.join(SETTINGS)}")
        if value == "default":
            self.params.pop(name, None)
            return
        try:
            number = kind(value)
        except ValueError:
            wanted = "an integer" if kind is int else "a number"
            raise RequestError(f"{name} is {value!r}; it must be {wanted}, or default") from None
        SamplingParams(**{name: number})
        self.params[name] = number

    # ---------------------------------------------------------------- files

    def save(self, path: Path) -> None:
        """Write the conversation as JSON: messages, system message, settings. A link is followed.

        Raises RequestError where something that is no file stands there, and OSError.
        """
        path = path.resolve() if path.is_symlink() else path
        if path.exists() and not path.is_file():
            raise RequestError(f"{path}: is no regular file")
        content = {
            "messages": self._turns,
            "system": self.system,
            "enable_thinking": self.enable_thinking,
            "params": {name: value for name, value in self.params.items() if name in SETTINGS},
        }
        write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def load(self, path: Path) -> None:
        """Take a conversation in the place of this one. Raises RequestError, and changes nothing then."""
        raw = read_json(path, error=RequestError)
        turns = raw.get("messages")
        turns = turns if isinstance(turns, list) else [None]
        whole = all(isinstance(t, dict) and isinstance(t.get("content"), str) for t in turns)
        if not whole or [turn.get("role") for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
            raise RequestError(f"{path}: messages must be user and assistant in turn, each with a content")
        system, thinking = raw.get("system", ""), raw.get("enable_thinking", self.enable_thinking)
        params = raw.get("params", {})
        if not isinstance(system, str) or not isinstance(thinking, bool) or not isinstance(params, dict):
            raise RequestError(
                f"{path}: system must be text, enable_thinking true or false, params an object"
            )
        try:
            "".join([system, *(turn["content"] for turn in turns)]).encode()
        except UnicodeEncodeError:
            raise RequestError(f"{path}: a text has half a surrogate pair, which is no character") from None
        unknown = next((name for name in params if name not in SETTINGS), None)
        if unknown is not None:
            raise RequestError(f"{path}: params.{unknown} cannot be set; known: {', '.join(SETTINGS)}")
        SamplingParams(**params)
        self.reset()
        self._turns = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
        self.system, self.enable_thinking = system, thinking
        self.params = {**self.params, **params}
