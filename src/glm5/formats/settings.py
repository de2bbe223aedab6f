"""The values of a `quantization_config`, read key by key; none of them is trusted.

A value of a wrong type, out of range or unknown is refused in one line that names the file, the
key and what was found. JSON null counts as absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as cut
from typing import Any

from glm5.disk.safetensors_file import shown
from glm5.errors import CheckpointError

# Past any width of a layer; larger groups would only overflow torch's counters.
LARGEST_GROUP = 1 << 24


@dataclass(frozen=True)
class Settings:
    """One JSON object and where it stands, for messages."""

    values: Mapping[str, Any]
    where: str  # "DIR/config.json: quantization_config"

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            raise CheckpointError(f"{self.where} is {quoted(self.values)}, not an object; download it again")

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def refuse(self, key: str, wanted: str) -> CheckpointError:
        """The error for `key`, whose value is not `wanted`."""
        found = f"is {quoted(self.values[key])}" if key in self else "is missing"
        return CheckpointError(
            f"{self.where}.{shown(key)} {found}; glm5 reads {wanted}: get this model in another format"
        )

    def whole(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number from `low` to `high`."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or not low <= value <= high:
            raise self.refuse(key, f"a whole number from {low} to {high}")
        return value

    def group_size(self, default: int | None = None) -> int | None:
        """`group_size`; -1 is None: one group a row."""
        if self.values.get("group_size") == -1 and type(self.values["group_size"]) is int:
            return None
        return self.whole("group_size", 1, LARGEST_GROUP, default)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not bool:
            raise self.refuse(key, "true or false")
        return value

    def choice(self, key: str, choices: Sequence[str], default: str | None = None) -> str:
        """One of `choices`, in any case of letters."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, str):
            found = next((choice for choice in choices if choice.lower() == value.lower()), None)
            if found is not None:
                return found
        raise self.refuse(key, ", ".join(choices))

    def texts(self, key: str) -> list[str]:
        """A list of strings; absent is empty."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.refuse(key, "a list of names")
        return value

    def section(self, key: str) -> Settings:
        """A nested object; absent is empty."""
        value = self.values.get(key)
        return Settings({} if value is None else value, f"{self.where}.{shown(key)}")

    def sections(self) -> Iterator[tuple[str, Settings]]:
        """Every value, each of which must be an object, by its key."""
        for key in self.values:
            yield key, self.section(key)


def quoted(value: Any) -> str:
    """A value from a file, short and printable."""
    try:
        return cut(value)
    except ValueError:  # a whole number with more digits than Python prints
        return f"a {type(value).__name__} with a number of thousands of digits"
