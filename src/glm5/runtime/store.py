"""Pages on disk, so that a prompt which was read yesterday is not read again today.

One file a page, named by a hash of all that its content depends on: the model, the layout, the owner and
every token up to the page's end. So a file is right whatever became of the others, and two processes may
share a folder. A file is written beside its place and renamed; what is read is checked against its own sum.
The folder holds at most `max_bytes`; the pages that were not asked for longest go first.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from glm5.disk.json_file import read_json
from glm5.errors import RequestError
from glm5.runtime.cache import PagePool

LAYOUT = 1
_ABOUT = "cache.json"
_END = ".page"
_log = logging.getLogger(__name__)


class PageStore:
    """Whole pages of one model in a folder of their own.

    fingerprint: names the weights, and everything else that decides the bits of a page.

    Raises:
        RequestError: the folder cannot be used, or holds the pages of another model.
    """

    def __init__(self, directory: Path, fingerprint: str, *, max_bytes: int = 8 << 30) -> None:
        if type(max_bytes) is not int or max_bytes < 1:
            raise RequestError(f"the size of the cache folder is {max_bytes!r}; it must be a number of bytes")
        self.directory, self.max_bytes = directory, max_bytes
        self.fingerprint = f"{LAYOUT} {fingerprint}"
        self.writes = True
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            about = directory / _ABOUT
            if about.exists():
                self._check(about)
            elif any(directory.iterdir()):
                raise RequestError(f"{directory}: is not empty and no cache folder; give another")
            else:
                _write(about, json.dumps({"glm5_cache": self.fingerprint}).encode())
            for path in directory.glob(".*.tmp"):
                path.unlink(missing_ok=True)
            self._bytes = sum(path.stat().st_size for path in directory.glob(f"*{_END}"))
        except OSError as error:
            raise RequestError(f"{error.filename or directory}: {error.strerror}") from None

    def _check(self, about: Path) -> None:
        found = read_json(about, error=RequestError).get("glm5_cache")
        if found != self.fingerprint:
            raise RequestError(
                f"{self.directory}: holds the cache of another model or version; give another folder, "
                "or empty this one"
            )

    def first_key(self, salt: Hashable) -> bytes:
        """Of an owner's texts."""
        return xxhash.xxh3_128_digest(f"{self.fingerprint} {salt!r}".encode())

    @staticmethod
    def next_key(key: bytes, tokens: Sequence[int]) -> bytes:
        """Of the page with these tokens, behind the page of `key`."""
        return xxhash.xxh3_128_digest(key + np.array(tokens, dtype=np.int64).tobytes())

    def load(self, key: bytes, pool: PagePool, page: int) -> bool:
        """Fill a page; False where there is none of this name, or it is damaged."""
        path = self._path(key)
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return False
        buffers = _views(pool, page)
        sizes = [buffer.nbytes for buffer in buffers]
        if len(content) != 8 + sum(sizes) or content[:8] != xxhash.xxh3_64_digest(content[8:]):
            path.unlink(missing_ok=True)
            return False
        at = 8
        for buffer, size in zip(buffers, sizes, strict=True):
            buffer[:] = np.frombuffer(content, dtype=np.uint8, count=size, offset=at)
            at += size
        return True

    def save(self, key: bytes, pool: PagePool, page: int, *, anew: bool = False) -> None:
        """Write a page, if it is not there yet or `anew`. A full disk ends the writing, with a line."""
        path = self._path(key)
        if not self.writes or (not anew and path.exists()):
            return
        body = b"".join(buffer.tobytes() for buffer in _views(pool, page))
        try:
            self._make_room(len(body) + 8)
            self._bytes += 0 if path.exists() else len(body) + 8
            _write(path, xxhash.xxh3_64_digest(body) + body)
        except OSError as error:
            self.writes = False
            _log.warning(f"{self.directory}: {error.strerror}; nothing more is kept there")

    def _make_room(self, wanted: int) -> None:
        if self._bytes + wanted <= self.max_bytes:
            return
        files = sorted((path.stat().st_mtime_ns, path) for path in self.directory.glob(f"*{_END}"))
        self._bytes = sum(path.stat().st_size for _, path in files)
        # A little more than is wanted, so that not every page looks through the folder.
        goal = self.max_bytes - wanted - self.max_bytes // 16
        for _, path in files:
            if self._bytes <= goal:
                break
            self._bytes -= path.stat().st_size
            path.unlink(missing_ok=True)

    def _path(self, key: bytes) -> Path:
        return self.directory / f"{key.hex()}{_END}"


def _views(pool: PagePool, page: int) -> list[np.ndarray]:
    """A page's memory as bytes, layer by layer."""
    return [_bytes(buffer[page]) for layer in pool.layers.values() for buffer in layer.buffers]


def _bytes(values: Tensor) -> np.ndarray:
    return values.flatten().view(torch.uint8).numpy()


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, for the user alone. What a power cut leaves is found by its sum."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
