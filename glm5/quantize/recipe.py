"""Which module becomes how many bits: one default, and patterns that overrule it.

A pattern is a shell pattern over module names as they are on disk
(`*.self_attn.*`, `model.layers.0.*`); of several that fit, the last one given counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from glm5.config import ModelConfig
from glm5.errors import RecipeError
from glm5.kernels.modules import Scheme
from glm5.kernels.packing import BITS

# Small, or decisive for the answer; a rule may overrule it.
KEPT = ("lm_head", "*.embed_tokens", "*.mlp.gate", "*.eh_proj")
# The indexer's keys, which choose what is read; vLLM joins the two into one matrix of floats.
NEVER = ("*.indexer.wk", "*.indexer.weights_proj")


@dataclass(frozen=True)
class Recipe:
    """bits and group of every linear layer; `rules` = (pattern, bits), 0 bits = keep as it is."""

    bits: int = 4
    group: int = 64
    rules: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        for bits in (self.bits, *(bits for _, bits in self.rules if bits)):
            if bits not in BITS:
                raise RecipeError(f"{bits} bits are not possible; use 4 or 8, or keep the module")
        if self.group <= 0 or self.group % 32:
            raise RecipeError(f"group {self.group} is not possible; use 32, 64 or 128")

    @classmethod
    def of(cls, bits: int, group: int, changes: list[str], keep: list[str]) -> Recipe:
        """From a command line: changes are `PATTERN=BITS`, keep are patterns.

        Raises RecipeError naming the argument that cannot be read.
        """
        rules = []
        for change in changes:
            pattern, equals, number = change.rpartition("=")
            if not equals or not pattern or number not in ("4", "8", "keep"):
                raise RecipeError(f"--set {change!r} is not PATTERN=4, PATTERN=8 or PATTERN=keep")
            rules.append((pattern, 0 if number == "keep" else int(number)))
        return cls(bits, group, (*rules, *((pattern, 0) for pattern in keep)))

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of a linear layer by its module name on disk; None = it stays as it is."""
        if never_rounded(module):
            return None
        bits = self.bits
        for pattern, chosen in (*((kept, 0) for kept in KEPT), *self.rules):
            if fnmatchcase(module, pattern):
                bits = chosen
        return Scheme(bits, self.group) if bits else None

    def as_dict(self) -> dict[str, object]:
        return {"bits": self.bits, "group": self.group, "rules": [list(rule) for rule in self.rules]}


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
