"""Which module becomes how many bits: one default, and patterns that overrule it.

A pattern is a shell pattern over module names as they are on disk
(`*.self_attn.*`, `model.layers.0.*`); of several that fit, the last one given counts. The embedding is
meant only by a pattern that spells `embed_tokens`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from glm5.config import ModelConfig
from glm5.errors import RecipeError
from glm5.formats.packed import Scheme
from glm5.formats.packing import BITS

# Small, or decisive for the answer; a rule may overrule it.
KEPT = ("lm_head", "*.embed_tokens", "*.mlp.gate", "*.eh_proj")
# Meant only by a pattern that spells it: transformers 5.24 reads no packed embedding.
EMBEDDING = "embed_tokens"
# The indexer's keys, which choose what is read; vLLM joins the two into one matrix of floats.
NEVER = ("*.indexer.wk", "*.indexer.weights_proj")

Rule = tuple[str, int] | tuple[str, int, int]
_CHANGE = re.compile(r"(?P<pattern>.+)=(?:keep|(?P<bits>[48])(?::(?P<group>[0-9]{1,6}))?)", re.DOTALL)


@dataclass(frozen=True)
class Recipe:
    """bits and group of every linear layer; `rules` = (pattern, bits[, group]), 0 bits = keep as it is."""

    bits: int = 4
    group: int = 64
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        for bits in (self.bits, *(rule[1] for rule in self.rules if rule[1])):
            if bits not in BITS:
                raise RecipeError(f"{bits} bits are not possible; use 4 or 8, or keep the module")
        for group in (self.group, *(rule[2] for rule in self.rules if len(rule) == 3)):
            if group <= 0 or group % 32:
                raise RecipeError(f"group {group} is not possible; use 32, 64 or 128")

    @classmethod
    def of(cls, bits: int, group: int, changes: list[str], keep: list[str]) -> Recipe:
        """From a command line: changes are `PATTERN=BITS[:GROUP]` or `PATTERN=keep`, keep are patterns.

        Raises RecipeError naming the argument that cannot be read.
        """
        rules: list[Rule] = []
        for change in changes:
            found = _CHANGE.fullmatch(change)
            if found is None:
                raise RecipeError(
                    f"--set {change!r} is not PATTERN=4, PATTERN=8, PATTERN=8:128 or PATTERN=keep"
                )
            rule = found["pattern"], int(found["bits"] or 0)
            rules.append((*rule, int(found["group"])) if found["group"] else rule)
        return cls(bits, group, (*rules, *((pattern, 0) for pattern in keep)))

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of a linear layer or embedding by its module name on disk; None = it stays as it is."""
        if never_rounded(module):
            return None
        found: tuple[int, ...] = (self.bits,)
        for pattern, *chosen in (*((kept, 0) for kept in KEPT), *self.rules):
            if fits(pattern, module):
                found = tuple(chosen)
        bits, group = (*found, self.group)[:2]
        return Scheme(bits, group) if bits else None

    def as_dict(self) -> dict[str, object]:
        return {"bits": self.bits, "group": self.group, "rules": [list(rule) for rule in self.rules]}


def fits(pattern: str, module: str) -> bool:
    """Does a rule's pattern mean this module?"""
    return fnmatchcase(module, pattern) and (EMBEDDING in pattern or not names_embedding(module))


def names_embedding(module: str) -> bool:
    return module.rpartition(".")[2] == EMBEDDING


def never_rounded(module: str) -> bool:
    """Does no rule reach this linear layer?"""
    return any(fnmatchcase(module, pattern) for pattern in NEVER)


def widest_group(config: ModelConfig) -> int:
    """The largest of 64 and 32 that divides every width a linear layer of this model reads."""
    widths = [config.hidden_size, config.intermediate_size, config.moe_intermediate_size]
    if config.uses_mla:
        widths += [config.num_attention_heads * config.v_head_dim]
        widths += [config.q_lora_rank or 0, config.kv_lora_rank or 0]
    else:
        widths.append(config.num_attention_heads * config.attention_head_dim)
    return 64 if all(width % 64 == 0 for width in widths) else 32
