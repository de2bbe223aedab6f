"""Damages files: bytes anywhere, and values of JSON and TOML that nobody meant."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

_VALUES: list[Any] = [
    None, True, -1, 0, 1, 3, 2**31, 2**63, -(2**63), 10**40, 0.5, -0.0, 1e308, "", "x", "\x1b[31m", "é" * 300,
    "x" * 20_000, "../../etc/passwd", "/dev/zero", "\ud800", [], [1], [[]], {}, {"x": 1}, [0] * 3000,
]  # fmt: skip


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """One to four damages, anywhere; now and then a value inside of JSON."""
    if rng.random() < 0.5:
        changed = _in_json(raw, rng)
        if changed is not None:
            return changed
    data = bytearray(raw)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(data) + 1)
        length = rng.choice([1, 1, 2, 8, 100, 5000])
        what = rng.randrange(7)
        if what == 0:
            del data[at:]
        elif what == 1 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif what == 2:
            data[at : at + length] = rng.randbytes(min(length, 64))
        elif what == 3:
            data[at:at] = data[: min(length, 2000)]
        elif what == 4:
            data[at : at + length] = bytes(length)
        elif what == 5:
            data[at : at + 8] = rng.choice([0, 1, 2**31, 2**62, 2**64 - 1]).to_bytes(8, "little")
        else:
            data[at:at] = rng.choice(
                [b"{", b"[" * 3000, b'"', b"\xff", b"\x00", b"1" * 5000, b"\r\n", b"null"]
            )
    return bytes(data)


def _in_json(raw: bytes, rng: random.Random) -> bytes | None:
    """A value of a JSON document, or of a safetensors header, exchanged, taken out or put twice."""
    size = int.from_bytes(raw[:8], "little") if len(raw) > 8 else 0
    in_header = 0 < size <= len(raw) - 8 and raw[8:9] == b"{"
    try:
        tree = json.loads(raw[8 : 8 + size] if in_header else raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(tree, dict) or not tree:
        return None
    for _ in range(rng.randrange(1, 4)):
        place, key = _somewhere(tree, rng)
        if key is None:
            continue
        if rng.random() < 0.15:
            del place[key]
        elif isinstance(place[key], int) and rng.random() < 0.5:
            place[key] = rng.choice([place[key] + 1, place[key] - 1, place[key] * 2, -place[key]])
        else:
            place[key] = copy.deepcopy(rng.choice(_VALUES))
    try:
        text = json.dumps(tree, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    except RecursionError:
        return None
    return len(text).to_bytes(8, "little") + text + raw[8 + size :] if in_header else text


def _somewhere(tree: Any, rng: random.Random) -> tuple[Any, Any]:
    place = tree
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return place, None
        key = rng.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
            place = place[key]
        else:
            return place, key
