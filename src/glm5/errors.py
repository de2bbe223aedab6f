"""Typed errors that a person meets: one line that says what, where and what to do.

    Glm5Error                something a user can act on
    +-- NativeModuleError    the compiled kernels are missing (an ImportError too)
    +-- ConfigError          a key of config.json
    +-- CheckpointError      a directory, shard, index, tensor or GGUF
    +-- TokenizerError       a tokenizer file, or text that cannot be encoded
    +-- TemplateError        a chat template or messages that cannot be rendered
    +-- RequestError         a parameter of a call: generation, sampling, loading
    +-- RecipeError          a key of a training recipe or of a quantization recipe
    +-- TrainingError        a run that cannot go on: its loss, its folder, its corpus

The API raises them, the CLI prints them and exits with code 2, a server answers 4xx.
"""

from __future__ import annotations

_LONGEST = 2000


class Glm5Error(Exception):
    """Something a user can act on; its message is one printable line of at most 2,000 characters.

    What a file says goes into messages: an escape sequence in it must not reach a terminal, and a value of
    megabytes is no clear line.
    """

    def __init__(self, message: object = "") -> None:
        text = _cut(str(message))
        super().__init__(_cut("".join(c if c.isprintable() else repr(c)[1:-1] for c in text)))


def _cut(text: str) -> str:
    middle = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[: middle - 5]} ... {text[-middle:]}"


class NativeModuleError(Glm5Error, ImportError):
    """The compiled kernels are missing or do not load."""


class ConfigError(Glm5Error):
    """A model configuration with an impossible, missing or contradictory key."""


class CheckpointError(Glm5Error):
    """A checkpoint directory, shard, index or tensor that cannot be used."""


class TokenizerError(Glm5Error):
    """A tokenizer file that cannot be used, or text that cannot be encoded."""


class TemplateError(Glm5Error):
    """A chat template or a list of messages that cannot be rendered."""


class RequestError(Glm5Error):
    """A call with an impossible parameter."""


class RecipeError(Glm5Error):
    """A training or quantization recipe with an unknown, missing or impossible key."""


class TrainingError(Glm5Error):
    """A training run that cannot go on: its loss is not finite, its folder or corpus is damaged."""
