"""Typed errors that a person meets: one line that says what, where and what to do.

The API raises them, the CLI prints them and exits with code 2, a server answers 4xx.
"""

from __future__ import annotations


class Glm5Error(Exception):
    """Something a user can act on; its message is one line."""


class ConfigError(Glm5Error):
    """A model configuration with an impossible, missing or contradictory key."""


class CheckpointError(Glm5Error):
    """A checkpoint directory, shard, index or tensor that cannot be used."""


class TokenizerError(Glm5Error):
    """A tokenizer file that cannot be used, or text that cannot be encoded."""


class TemplateError(Glm5Error):
    """A chat template or a list of messages that cannot be rendered."""


class RequestError(Glm5Error):
    """A generation request with an impossible parameter."""


class RecipeError(Glm5Error):
    """A training recipe with an unknown, missing or impossible key."""
