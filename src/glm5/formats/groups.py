"""The `config_groups` of compressed-tensors: which modules are stored how.

Follows compressed-tensors 0.20: a module's own name goes before a `re:` pattern, that before a
class. Among patterns that fit, the first in the alphabet decides.
"""

from __future__ import annotations

from dataclasses import dataclass

from glm5.errors import CheckpointError
from glm5.formats.patterns import MAX_PATTERNS, NamePattern
from glm5.formats.settings import LARGEST_GROUP, Settings, quoted

MAX_GROUPS = 1000
MAX_NAMES = 1_000_000
_PLAIN = ("dense", "fakequant")
_SPREADS = ("tensor", "channel", "group", "block")
# Per format and type: bits, strategies and, where it is fixed, the group size.
_READABLE: dict[tuple[str, str], tuple[range, tuple[str, ...], int | None]] = {
    ("pack-quantized", "int"): (range(2, 9), _SPREADS, None),
    ("int-quantized", "int"): (range(2, 9), _SPREADS, None),
    ("naive-quantized", "int"): (range(2, 9), _SPREADS, None),
    ("float-quantized", "float"): (range(8, 9), _SPREADS, None),
    ("naive-quantized", "float"): (range(8, 9), _SPREADS, None),
    ("mxfp8-quantized", "float"): (range(8, 9), ("group",), 32),
    ("mxfp4-pack-quantized", "float"): (range(4, 5), ("group",), 32),
    ("nvfp4-pack-quantized", "float"): (range(4, 5), ("tensor_group",), 16),
}
FORMATS = tuple(dict.fromkeys(name for name, _ in _READABLE))


@dataclass(frozen=True)
class Group:
    """How the weights of some modules are stored; the words are those of compressed-tensors."""

    name: str
    format: str  # pack-quantized, float-quantized, nvfp4-pack-quantized, ...
    type: str  # int, float
    bits: int
    symmetric: bool
    strategy: str  # tensor, channel, group, block, tensor_group (NVFP4)
    group_size: int | None  # of strategies group and tensor_group
    block: tuple[int, int] | None  # rows and columns, of strategy block


class Groups:
    """Answers which group a module belongs to."""

    def __init__(self, settings: Settings) -> None:
        groups = settings.section("config_groups")
        if not groups.values or len(groups.values) > MAX_GROUPS:
            raise settings.refuse("config_groups", f"between one and {MAX_GROUPS} groups")
        self._ignored = _Targets(settings, "ignore")
        self._targets: list[tuple[_Targets, Group | None]] = []
        overall = settings.choice("format", (*FORMATS, *_PLAIN, "mixed-precision"), "mixed-precision")
        for name, entry in groups.sections():
            self._targets.append((_Targets(entry, "targets"), _group(name, entry, overall)))
        every = [self._ignored, *(targets for targets, _ in self._targets)]
        if sum(len(targets.patterns) for targets in every) > MAX_PATTERNS:
            raise CheckpointError(
                f"{settings.where}: has more than {MAX_PATTERNS} patterns; get another copy of this model"
            )
        self._known: dict[str, Group | None] = {}

    def of(self, module: str) -> Group | None:
        """The group of a module by its name on disk; None: its weight is stored as it is.

        A name does not tell a class: the target `Linear` is taken to mean every module but the
        embedding.
        """
        if module not in self._known:
            self._known[module] = self._found(module) if self._ignored.rank(module) is None else None
        return self._known[module]

    def _found(self, module: str) -> Group | None:
        best: tuple[int, str] | None = None
        group = None
        for targets, candidate in self._targets:
            rank = targets.rank(module)
            # Of two groups with the same target, the later one counts.
            if rank is not None and (best is None or rank <= best):
                best, group = rank, candidate
        return group


class _Targets:
    """A list of targets: module names, `re:` patterns and class names."""

    def __init__(self, settings: Settings, key: str) -> None:
        texts = settings.texts(key)
        if len(texts) > MAX_NAMES:
            raise settings.refuse(key, f"at most {MAX_NAMES} names")
        self._names = frozenset(text for text in texts if not text.startswith("re:"))
        self.patterns: list[tuple[str, NamePattern]] = []
        for text in sorted(set(texts) - self._names):
            try:
                self.patterns.append((text, NamePattern(text.removeprefix("re:"))))
            except ValueError as error:
                raise CheckpointError(
                    f"{settings.where}.{key}: {quoted(text)} {error}; get another copy of this model"
                ) from None

    def rank(self, module: str) -> tuple[int, str] | None:
        """How well the best target fits, the smallest being the best; None: none does."""
        if module in self._names:
            return 0, module
        pattern = next((text for text, pattern in self.patterns if pattern.matches(module)), None)
        if pattern is not None:
            return 1, pattern
        embedding = module.rpartition(".")[2] == "embed_tokens"
        kind = "Embedding" if embedding else "Linear"
        return (2, kind) if kind in self._names else None


def _group(name: str, entry: Settings, overall: str) -> Group | None:
    """None: the weights of these modules are stored as they are."""
    weights = entry.section("weights")
    form = None if overall == "mixed-precision" else overall
    if "format" in entry:
        form = entry.choice("format", (*FORMATS, *_PLAIN))
    if "weights" not in entry or form in _PLAIN:
        return None
    kind = weights.choice("type", ("int", "float"), "int")
    bits = weights.whole("num_bits", 2, 8, 8)
    strategy, size = _strategy(weights)
    form = form or _inferred(entry, weights, kind, bits, size)
    symmetric = weights.flag("symmetric", True)
    if (form, kind) not in _READABLE:
        raise weights.refuse("type", f"{form} of another type")
    widths, strategies, fixed_size = _READABLE[form, kind]
    if bits not in widths:
        raise weights.refuse("num_bits", f"{form} with {' or '.join(map(str, widths))} bits")
    if strategy not in strategies:
        raise weights.refuse("strategy", f"{form} with strategy {' or '.join(strategies)}")
    if fixed_size not in (None, size):
        raise weights.refuse("group_size", f"{form} with groups of {fixed_size}")
    if kind == "float" and not symmetric:
        raise weights.refuse("symmetric", f"{form} without zero points")
    block = _block(weights) if strategy == "block" else None
    return Group(name, form, kind, bits, symmetric, strategy, size, block)


def _strategy(weights: Settings) -> tuple[str, int | None]:
    """The strategy, from the group size where it is left out, and the group size it needs."""
    size = weights.group_size() if "group_size" in weights else None
    implied = "group" if size else "channel" if "group_size" in weights else "tensor"
    strategy = weights.choice("strategy", (*_SPREADS, "tensor_group"), implied)
    if "group" not in strategy:
        return strategy, None
    if size is None:
        raise weights.refuse("group_size", "a size for strategy group")
    return strategy, size


def _inferred(entry: Settings, weights: Settings, kind: str, bits: int, size: int | None) -> str:
    """The format that compressed-tensors writes for a group that does not name one."""
    if kind == "int":
        return "int-quantized" if "input_activations" in entry else "pack-quantized"
    if bits == 8:
        exponents = weights.values.get("scale_dtype") in ("torch.uint8", "uint8")
        return "mxfp8-quantized" if size == 32 and exponents else "float-quantized"
    return "mxfp4-pack-quantized" if size == 32 else "nvfp4-pack-quantized"


def _block(weights: Settings) -> tuple[int, int]:
    value = weights.values.get("block_structure")
    if isinstance(value, str):  # "128x128", as old versions wrote it
        value = [int(part) if part.isdecimal() and len(part) < 9 else 0 for part in value.split("x")]
    if not isinstance(value, list) or len(value) != 2:
        raise weights.refuse("block_structure", "two sizes")
    if not all(type(size) is int and 0 < size <= LARGEST_GROUP for size in value):
        raise weights.refuse("block_structure", "two sizes")
    return value[0], value[1]
