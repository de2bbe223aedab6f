"""Jobs that stop half way: the same call finishes them, and no half is ever taken for a whole."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from glm5.checkpoint import save_model
from glm5.errors import CheckpointError, ConfigError, Glm5Error
from glm5.layers.loading import load_model
from glm5.quantize import Recipe, directory, quantize
from glm5.quantize.directory import PLAN_FILE, WORKING
from tests.checkpoint.checkpoint_fixture import refused
from tests.checkpoint.test_writing import in_child
from tests.model_fixture import tiny_config, tiny_model
from tests.quantize.quantize_fixture import RECIPE, contents, killed_at
from tests.quantize.quantize_fixture import no_flushing as no_flushing

SHARD = 12_000  # bytes: four shards


def start(source: Path, destination: Path, **options: Any) -> dict[str, Any]:
    return quantize(source, destination, RECIPE, shard_bytes=SHARD, **options)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a small source, what an undisturbed job makes of it)"""
    root = tmp_path_factory.mktemp("interruptions")
    sizes = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    sizes |= {"n_routed_experts": 4, "moe_intermediate_size": 32, "head_dim": 24, "vocab_size": 64}
    save_model(tiny_model(tiny_config("glm4_moe", **sizes)), root / "source", stored="bf16")
    start(root / "source", root / "whole")
    assert len(list((root / "whole").glob("*.safetensors"))) == 4
    return root / "source", root / "whole"


def finished(working: Path) -> dict[str, tuple[int, bytes]]:
    """The shards of a half-done job that have their receipt."""
    receipts = {path.stem.removeprefix("shard-") for path in working.glob("shard-*.json")}
    shards = [p for p in working.glob("model-*.safetensors") if p.name.split("-")[1] in receipts]
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in shards}


def assert_left_alone(done: dict[str, tuple[int, bytes]], destination: Path) -> None:
    for name, (mtime, content) in done.items():
        assert (destination / name).stat().st_mtime_ns == mtime, name
        assert (destination / name).read_bytes() == content, name


def calls_of(source: Path, destination: Path) -> int:
    calls: list[int] = []
    start(source, destination, progress=lambda *_: calls.append(1))
    shutil.rmtree(destination)
    return len(calls)


# --- errors and Ctrl-C ------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "step"), [(KeyboardInterrupt, 2), (RuntimeError, 7)])
def test_a_job_stopped_at_any_tensor_is_taken_up(
    tmp_path: Path, places: tuple[Path, Path], error: type[BaseException], step: int
) -> None:
    source, whole = places
    number, destination = calls_of(source, tmp_path / "int4"), tmp_path / "int4"
    assert number > 20
    shards_done = []
    for stop in range(1, number + 1, step):
        seen = 0

        def stop_there(done: int, total: int, stop: int = stop) -> None:
            nonlocal seen
            seen += 1
            if seen == stop:
                raise error

        with pytest.raises(error):
            start(source, destination, progress=stop_there)
        assert set(os.listdir(destination)) == {WORKING}
        assert not [name for name in os.listdir(destination / WORKING) if name.endswith(".tmp")]
        with refused(ConfigError, "config.json"):
            load_model(destination)
        done = finished(destination / WORKING)
        start(source, destination)
        assert_left_alone(done, destination)
        assert contents(destination) == contents(whole)
        shards_done.append(len(done))
        shutil.rmtree(destination)
    assert shards_done == sorted(shards_done)
    assert {0, 1, 2, 3} <= set(shards_done)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_disk_that_fills_up_is_told_and_the_same_call_goes_on(
    tmp_path: Path, places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    source, whole = places
    write, seen = directory.write_safetensors, 0

    def full(path: Path, tensors: Any, **options: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            path.write_bytes(b"half a shard")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, tensors, **options)

    with monkeypatch.context() as patch:
        patch.setattr(directory, "write_safetensors", full)
        with refused(CheckpointError, tmp_path / "int4", "No space left", "goes on from here"):
            start(source, tmp_path / "int4")
    done = finished(tmp_path / "int4" / WORKING)
    assert len(done) == number - 1
    calls: list[tuple[int, int]] = []
    receipt = start(source, tmp_path / "int4", progress=lambda *c: calls.append(c))
    assert_left_alone(done, tmp_path / "int4")
    assert contents(tmp_path / "int4") == contents(whole)
    assert calls[-1] == (receipt["source_bytes"], receipt["source_bytes"])


def test_a_job_stopped_many_times_is_finished(tmp_path: Path, places: tuple[Path, Path]) -> None:
    source, whole = places
    attempts = seen = 0
    while not (tmp_path / "int4" / "config.json").exists():
        attempts, seen = attempts + 1, 0

        def stop_soon(done: int, total: int) -> None:
            nonlocal seen
            seen += 1
            if seen == 16:
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            start(source, tmp_path / "int4", progress=stop_soon)
        assert attempts < 9
    assert attempts > 2
    assert contents(tmp_path / "int4") == contents(whole)


# --- another job in its place -----------------------------------------------------------------------


def half_done(source: Path, destination: Path) -> None:
    seen = 0

    def stop(done: int, total: int) -> None:
        nonlocal seen
        seen += 1
        if seen == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(source, destination, progress=stop)
    assert finished(destination / WORKING)


def test_a_half_done_job_is_not_mixed_with_another(tmp_path: Path, places: tuple[Path, Path]) -> None:
    source, whole = places
    other = tmp_path / "other source"
    shutil.copytree(source, other)
    destination = tmp_path / "int4"
    half_done(source, destination)
    before = contents(destination)
    for job in (
        lambda: quantize(source, destination, Recipe(8, 32), shard_bytes=SHARD),
        lambda: quantize(source, destination, Recipe(4, 32, (("*.o_proj", 0),)), shard_bytes=SHARD),
        lambda: quantize(source, destination, RECIPE, shard_bytes=SHARD + 1),
        lambda: start(other, destination),
    ):
        with refused(CheckpointError, destination / WORKING, "another source or recipe", "--restart"):
            job()
        assert contents(destination) == before
    start(source, destination)
    assert contents(destination) == contents(whole)


def test_a_source_that_changed_meanwhile_is_not_mixed_in(tmp_path: Path, places: tuple[Path, Path]) -> None:
    shutil.copytree(places[0], tmp_path / "source")
    half_done(tmp_path / "source", tmp_path / "int4")
    weights = tmp_path / "source" / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    with refused(CheckpointError, "another source or recipe"):
        start(tmp_path / "source", tmp_path / "int4")


def test_restart_begins_anew(tmp_path: Path, places: tuple[Path, Path]) -> None:
    source, whole = places
    half_done(source, tmp_path / "int4")
    recipe = Recipe(8, 32)
    quantize(source, tmp_path / "int4", recipe, shard_bytes=SHARD, restart=True)
    quantize(source, tmp_path / "wanted", recipe, shard_bytes=SHARD)
    assert contents(tmp_path / "int4") == contents(tmp_path / "wanted")
    start(source, tmp_path / "new", restart=True)  # nothing to throw away
    assert contents(tmp_path / "new") == contents(whole)


# --- kills ------------------------------------------------------------------------------------------


class Kill(NamedTuple):
    """What one kill left: before the plan, among the shards, or while the files moved up."""

    stage: str
    error: str  # of the same call, "" where it finished
    others: set[str]  # files that an undisturbed job does not leave
    is_whole: bool  # every other file is there, with its bytes


@pytest.fixture(scope="module")
def kills(places: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Kill]:
    """The job killed at each of its operations on the destination, and called again."""
    source, whole = places
    wanted, found = contents(whole), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # a killed process leaves the disk's cache whole
        for number in range(1, 400):
            destination = tmp_path_factory.mktemp("killed") / "int4"
            code = in_child(lambda n=number, d=destination: killed_at(n, d, lambda: start(source, d)))
            assert code in (0, 9)
            if code == 0:
                break
            found.append(after_kill(source, destination, wanted))
            shutil.rmtree(destination.parent)
    return found


def after_kill(source: Path, destination: Path, wanted: dict[str, bytes]) -> Kill:
    working, config = destination / WORKING, destination / "config.json"
    if config.exists():  # from here on the checkpoint is whole
        stage = "done"
        load_model(destination)
    else:
        moving = any(destination.glob("*.safetensors")) or (working / "config.json").exists()
        stage = "moving" if moving else "shards" if (working / PLAN_FILE).exists() else "planning"
        with pytest.raises(Glm5Error):
            load_model(destination)
    error = ""
    try:
        start(source, destination)
    except CheckpointError as refusal:
        error = str(refusal)
    left = contents(destination)
    is_whole = all(left.get(name) == content for name, content in wanted.items())
    return Kill(stage, error, set(left) - set(wanted), is_whole)


skip_without_fork = pytest.mark.skipif(
    not hasattr(os, "fork") or sys.platform == "win32", reason="kills a fork"
)


@skip_without_fork
@pytest.mark.parametrize("stage", ["planning", "shards", "moving", "done"])
def test_the_same_call_finishes_a_killed_job(kills: list[Kill], stage: str) -> None:
    found = [kill for kill in kills if kill.stage == stage]
    assert len(found) >= {"planning": 3, "shards": 25, "moving": 5, "done": 1}[stage]
    for kill in found:
        finished_before = stage == "done" and "holds a checkpoint already" in kill.error
        assert kill.is_whole, kill
        assert not kill.error or finished_before, kill
        assert not kill.others, kill  # no temporary file, no plan


def cut_while_moving(source: Path, destination: Path, moved: int) -> None:
    """The job, stopped when so many of its files are in their place."""
    replace, seen = os.replace, 0

    def stop(old: Path, new: Path) -> None:
        nonlocal seen
        if Path(new).parent == destination:
            seen += 1
            if seen > moved:
                raise KeyboardInterrupt
        replace(old, new)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            start(source, destination)
    assert len(list(destination.glob("*.*"))) == moved + 1  # and the working folder


@pytest.mark.parametrize("moved", [0, 1, 3])
def test_a_job_cut_while_its_files_move_is_finished_or_begun_anew(
    tmp_path: Path, places: tuple[Path, Path], moved: int
) -> None:
    source, whole = places
    for name, restart in (("same", False), ("anew", True)):
        cut_while_moving(source, tmp_path / name, moved)
        start(source, tmp_path / name, restart=restart)
        assert contents(tmp_path / name) == contents(whole)
    cut_while_moving(source, tmp_path / "other", moved)
    with refused(CheckpointError, "another source or recipe"):
        quantize(source, tmp_path / "other", Recipe(8, 32))


def test_another_job_leaves_nothing_of_one_cut_while_its_files_moved(
    tmp_path: Path, places: tuple[Path, Path]
) -> None:
    cut_while_moving(places[0], tmp_path / "int4", moved=3)  # of four shards
    quantize(places[0], tmp_path / "int4", Recipe(8, 32), restart=True)  # all in one
    quantize(places[0], tmp_path / "wanted", Recipe(8, 32))
    assert contents(tmp_path / "int4") == contents(tmp_path / "wanted")


def test_restart_does_not_take_a_finished_job_for_another(tmp_path: Path, places: tuple[Path, Path]) -> None:
    """Cut when all files but the plan had gone: this is a checkpoint, and of the first recipe."""
    source, whole = places
    unlink = Path.unlink

    def stop(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name == PLAN_FILE and path.parent.parent == tmp_path / "int4":
            raise KeyboardInterrupt
        unlink(path, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", stop)
        with pytest.raises(KeyboardInterrupt):
            start(source, tmp_path / "int4")
    load_model(tmp_path / "int4")
    with suppress(CheckpointError):  # refused, or done: but not told as done
        receipt = quantize(source, tmp_path / "int4", Recipe(8, 32), restart=True)
        assert receipt["recipe"]["bits"] == 8
    start_again = contents(tmp_path / "int4")
    assert all(start_again[name] == content for name, content in contents(whole).items())
