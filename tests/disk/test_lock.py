"""The lock of a folder: one writer, and none left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from glm5.disk.lock import locked
from glm5.errors import CheckpointError, TrainingError

pytest.importorskip("fcntl")

HOLD = """
import sys, pathlib
from glm5.disk.lock import locked
from glm5.errors import TrainingError
with locked(pathlib.Path(sys.argv[1]), TrainingError):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_holder_at_a_time_and_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with (
        locked(folder, TrainingError),
        pytest.raises(CheckpointError, match="another process writes there now"),
        locked(folder, CheckpointError),
    ):
        pass
    with locked(folder, TrainingError):
        assert not list(folder.iterdir())


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(TrainingError), locked(tmp_path, TrainingError):
        pass
    holder.kill()
    holder.communicate()
    with locked(tmp_path, TrainingError):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    taken = pytest.raises(TrainingError, match="file: cannot be written")
    with taken, locked(tmp_path / "file", TrainingError):
        pass
