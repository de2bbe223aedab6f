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
import threading
import time
from collections.abc import Hashable, Sequence
from contextlib import suppress
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
_OLD = 3600  # seconds after which a temporary file is nobody's
_LOOK = 32  # pages written between two looks at what others wrote
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
            if about.exists() and about.stat().st_size > 0:  # an empty one is what a power cut leaves
                self._check(about)
            else:
                others = [p.name for p in directory.iterdir() if not p.name.endswith((".tmp", _END, _ABOUT))]
                if others:
                    raise RequestError(f"{directory}: is not empty and no cache folder; give another")
                _write(about, json.dumps({"glm5_cache": self.fingerprint}).encode(), durable=True)
            for path in directory.glob(".*.tmp"):
                with suppress(OSError):  # another process may be writing a young one
                    if time.time() - path.stat().st_mtime > _OLD:
                        path.unlink()
            self._bytes, self._written = sum(size for _, size, _ in self._files()), 0
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
            name = getattr(error, "filename", None) or directory
            raise RequestError(f"{name}: {getattr(error, 'strerror', None) or error}") from None

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
        except OSError:
            return False
        with suppress(OSError):  # a folder that may be read only
            os.utime(path)
        buffers = _views(pool, page)
        sizes = [buffer.nbytes for buffer in buffers]
        if len(content) != 8 + sum(sizes) or content[:8] != xxhash.xxh3_64_digest(content[8:]):
            with suppress(OSError):
                path.unlink()
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
        if len(body) + 8 > self.max_bytes:
            self.writes = False
            _log.warning(f"{self.directory}: a page of {len(body):,} bytes is more than the folder may hold")
            return
        try:
            self._make_room(len(body) + 8)
            self._bytes += 0 if path.exists() else len(body) + 8
            _write(path, xxhash.xxh3_64_digest(body) + body)
        except OSError as error:
            self.writes = False
            _log.warning(f"{self.directory}: {error.strerror}; nothing more is kept there")

    def _make_room(self, wanted: int) -> None:
        self._written += 1
        if self._bytes + wanted <= self.max_bytes and self._written % _LOOK:
            return
        files = self._files()  # other processes write there too
        self._bytes = sum(size for _, size, _ in files)
        if self._bytes + wanted <= self.max_bytes:
            return
        # A little more than is wanted, so that not every page looks through the folder.
        goal = self.max_bytes - wanted - self.max_bytes // 16
        for _, size, path in files:
            if self._bytes <= goal:
                break
            self._bytes -= size
            path.unlink(missing_ok=True)

    def _files(self) -> list[tuple[int, int, Path]]:
        """(time, size, path) of every page, the one that was not asked for longest first."""
        found = []
        for path in self.directory.glob(f"*{_END}"):
            with suppress(FileNotFoundError):  # another process made room
                about = path.stat()
                found.append((about.st_mtime_ns, about.st_size, path))
        return sorted(found)

    def _path(self, key: bytes) -> Path:
        return self.directory / f"{key.hex()}{_END}"


def _views(pool: PagePool, page: int) -> list[np.ndarray]:
    """A page's memory as bytes, layer by layer."""
    return [_bytes(buffer[page]) for layer in pool.layers.values() for buffer in layer.buffers]


def _bytes(values: Tensor) -> np.ndarray:
    return values.flatten().view(torch.uint8).numpy()


def _write(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Whole or not at all, for the user alone. What a power cut leaves of a page is found by its sum."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
