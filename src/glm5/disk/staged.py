"""A directory of files that is whole or not there: written aside, then moved up with its last file last.

The files are written into a subfolder first, so that a full disk or a bad weight leaves what was there. Then
they are moved up while the `seal` (config.json) is away: a crash between two moves leaves a directory that
every reader refuses, never a mixture of two.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from glm5.disk.files import fsync_directory
from glm5.disk.lock import locked
from glm5.errors import CheckpointError

SEAL = "config.json"
# Only a crash leaves one behind.
STAGING = ".glm5-saving"


@contextmanager
def staged(directory: Path, belongs: Callable[[str], bool]) -> Iterator[Path]:
    """Yield a folder to write every file into; on success they take the place of what `directory` held.

    belongs: is a file of this name part of what is replaced? Those that are not written anew are removed.

    Raises:
        CheckpointError: another process writes there now, or the disk refuses; unless files were being moved
            already, nothing is changed.
    """
    with locked(directory, CheckpointError):
        yield from _staged(directory, belongs)


def _staged(directory: Path, belongs: Callable[[str], bool]) -> Iterator[Path]:
    final, whole = directory / STAGING, False
    # What an interrupted save left may be the only whole copy: it stays until the new one is whole.
    staging = directory / f"{STAGING}-new" if _is_interrupted(directory) else final
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        in_the_way = next((p for p in staging.iterdir() if (directory / p.name).is_dir()), None)
        if in_the_way is not None:
            raise CheckpointError(f"{directory / in_the_way.name}: is a directory; move it away first")
        if staging != final:
            shutil.rmtree(final)
            os.replace(staging, final)
            staging = final
        whole = True
    except OSError as error:
        raise CheckpointError(
            f"{directory}: cannot be written ({error.strerror}); nothing is changed"
        ) from None
    finally:
        if not whole:
            shutil.rmtree(staging, ignore_errors=True)
    try:
        move_up(staging, directory, belongs)
        staging.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"{staging}: cannot be moved into place ({error.strerror}); move its files up, {SEAL} last"
        ) from None


def move_up(
    staging: Path, directory: Path, belongs: Callable[[str], bool], stays: frozenset[str] = frozenset()
) -> None:
    """Put staged files in place of the old ones, the seal last; every step is on the disk before the next.

    belongs: as in `staged`. stays: names that are not moved. Called again after a crash, it goes on.
    """
    names = {path.name for path in staging.iterdir()} - stays
    (directory / SEAL).unlink(missing_ok=True)
    fsync_directory(directory)
    for path in list(directory.iterdir()):
        stale = path.name not in names or path.name.endswith(".index.json")  # an index speaks of other files
        if stale and path.is_file() and belongs(path.name):
            path.unlink()
    fsync_directory(directory)
    for name in sorted(names - {SEAL}):
        os.replace(staging / name, directory / name)
    fsync_directory(directory)
    if SEAL in names:
        os.replace(staging / SEAL, directory / SEAL)
    fsync_directory(directory)


def _is_interrupted(directory: Path) -> bool:
    return (directory / STAGING / SEAL).is_file() and not (directory / SEAL).exists()


def refuse_interrupted(directory: Path) -> None:
    """Raise CheckpointError when a crash left staged files that were being moved."""
    if _is_interrupted(directory):
        raise CheckpointError(
            f"{directory}: a save was cut off while it moved its files into place; "
            f"move those in {STAGING} up, {SEAL} last, or save again"
        )
