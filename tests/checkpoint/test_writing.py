"""Directories out: a failed or killed save never damages what was there, nor mixes two models."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glm5.checkpoint import save_model
from glm5.checkpoint.writing import stored_config
from glm5.disk.shards import INDEX_FILE, SINGLE_FILE
from glm5.disk.staged import STAGING
from glm5.errors import CheckpointError, Glm5Error
from glm5.layers.loading import load_model
from glm5.model.transformer import GlmForCausalLM
from tests.checkpoint.checkpoint_fixture import Tensors, assert_same_bits, refused, weights
from tests.model_fixture import tiny_config, tiny_model

SMALL: dict[str, Any] = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "n_routed_experts": 4}
ONE, FEW, MORE = 10**9, 300_000, 150_000  # bytes of a shard


def old_model() -> GlmForCausalLM:
    return tiny_model(tiny_config(**SMALL, eos_token_id=1), seed=1)


def new_model() -> GlmForCausalLM:
    """The same shapes, other weights, another config."""
    return tiny_model(tiny_config(**SMALL, eos_token_id=2), seed=2)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def in_child(action: Callable[[], None]) -> int:
    """Exit code of a forked process: 0 done, 2 CheckpointError, 3 anything else, or its own."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            torch.set_num_threads(1)  # a forked OpenMP pool would hang
            action()
            code = 0
        except CheckpointError:
            code = 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_before_file_operation(number: int, directory: Path) -> None:
    """Kill this process at its n-th operation on a name in `directory`, as a power cut would."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        if str(arguments[0]).startswith(str(directory)):
            seen += 1
            if seen == number:
                os._exit(9)

    sys.addaudithook(hook)


# --- saves that fail -------------------------------------------------------------------------


@pytest.mark.parametrize("old", [ONE, FEW], ids=["one file", "shards"])
def test_a_bad_weight_in_a_late_shard_leaves_the_old_checkpoint(tmp_path: Path, old: int) -> None:
    save_model(old_model(), tmp_path, shard_bytes=old)
    before, bad = contents(tmp_path), new_model()
    with torch.no_grad():
        bad.mtp[0].layer.mlp.experts.gate_up_proj[2, 41, 3] = float("inf")
    with refused(CheckpointError, "model.layers.1.mlp.experts.2.up_proj.weight", "FP8"):
        save_model(bad, tmp_path, stored="fp8", shard_bytes=20_000)
    assert contents(tmp_path) == before
    assert not (tmp_path / STAGING).exists()
    assert_same_bits(weights(load_model(tmp_path)), weights(old_model()))


def test_a_failed_first_save_leaves_nothing(tmp_path: Path) -> None:
    bad = new_model()
    with torch.no_grad():
        bad.lm_head.weight[7, 7] = 1e6
    with refused(CheckpointError, "lm_head.weight", "fp16", "bf16"):
        save_model(bad, tmp_path / "new", stored="fp16", shard_bytes=MORE)
    assert list((tmp_path / "new").iterdir()) == []
    with refused(CheckpointError, "int3", "bf16"):
        save_model(bad, tmp_path / "new", stored="int3")


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
@pytest.mark.parametrize("limit", [0, 1000, 200_000])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, limit: int) -> None:
    import resource

    save_model(old_model(), tmp_path, shard_bytes=FEW)
    before = contents(tmp_path)

    def save_on_a_full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        save_model(new_model(), tmp_path, shard_bytes=FEW)

    assert in_child(save_on_a_full_disk) == 2
    assert contents(tmp_path) == before
    assert not (tmp_path / STAGING).exists()


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with refused(CheckpointError, tmp_path / "file", "cannot be written"):
        save_model(old_model(), tmp_path / "file")


def test_a_folder_in_the_way_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).mkdir()
    with refused(CheckpointError, tmp_path / SINGLE_FILE, "is a directory"):
        save_model(new_model(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE_FILE]


def test_files_that_cannot_be_moved_up_wait_for_a_person(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(source: Path, target: Path) -> None:
        if Path(target).parent == tmp_path:
            raise OSError(errno.EIO, "Input/output error")
        os.rename(source, target)

    with monkeypatch.context() as context:
        context.setattr(os, "replace", refuses)
        with refused(CheckpointError, tmp_path / STAGING, "config.json last"):
            save_model(new_model(), tmp_path)
    with refused(CheckpointError, tmp_path, STAGING):
        load_model(tmp_path)
    for name in (SINGLE_FILE, "config.json"):
        (tmp_path / STAGING / name).rename(tmp_path / name)
    assert_same_bits(weights(load_model(tmp_path)), weights(new_model()))


# --- saves that are killed -------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.parametrize(
    ("before", "after", "stored"),
    [(ONE, ONE, "fp32"), (ONE, FEW, "fp32"), (FEW, ONE, "fp32"), (FEW, FEW, "fp32"), (FEW, MORE, "fp8")],
)
def test_a_save_killed_at_any_step_never_mixes_two_models(
    tmp_path: Path, before: int, after: int, stored: str
) -> None:
    save_model(old_model(), tmp_path / "old", shard_bytes=before)
    save_model(new_model(), tmp_path / "new", shard_bytes=after, stored=stored)
    states = {name: weights(load_model(tmp_path / name, dtype=torch.float32)) for name in ("old", "new")}
    configs = {"old": old_model().config, "new": stored_config(new_model().config, stored)}
    place, outcomes = tmp_path / "place", []

    def save_and_die(number: int) -> None:
        die_before_file_operation(number, place)
        save_model(new_model(), place, shard_bytes=after, stored=stored)

    for number in range(1, 200):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(tmp_path / "old", place)
        code = in_child(lambda number=number: save_and_die(number))
        assert code in (0, 9)
        outcomes.append(which_model(place, states))
        for config in configs.values():  # the weights alone are of one model too
            which_weights(place, config, states)
        if code == 0:
            break
    # Old until the move begins, nothing during it, new from its last step on.
    assert outcomes == sorted(outcomes, key=["old", "none", "new"].index)
    assert set(outcomes) == {"old", "none", "new"}
    assert outcomes.count("none") <= 4 + len(contents(tmp_path / "old")) + 2 * len(contents(tmp_path / "new"))
    assert contents(place) == contents(tmp_path / "new")


def which_model(place: Path, states: dict[str, Tensors]) -> str:
    if not (place / "config.json").exists():
        with refused(CheckpointError, place, STAGING):
            load_model(place)
        return "none"
    model = load_model(place, dtype=torch.float32)
    name = {1: "old", 2: "new"}[model.config.eos_token_id]
    assert_same_bits(weights(model), states[name])
    return name


def which_weights(place: Path, config: Any, states: dict[str, Tensors]) -> None:
    try:
        found = weights(load_model(place, dtype=torch.float32, config=config))
    except Glm5Error:
        return
    wanted = next(s for s in states.values() if torch.equal(s["lm_head.weight"], found["lm_head.weight"]))
    assert_same_bits(found, wanted)


def test_a_save_after_a_killed_one_is_whole(tmp_path: Path) -> None:
    save_model(old_model(), tmp_path, shard_bytes=MORE)
    (tmp_path / "config.json").rename(tmp_path / "gone")
    shutil.copytree(tmp_path, tmp_path / STAGING)
    (tmp_path / STAGING / "gone").rename(tmp_path / STAGING / "config.json")
    (tmp_path / "gone").unlink()
    with refused(CheckpointError, tmp_path, STAGING, "config.json last"):
        load_model(tmp_path)
    save_model(new_model(), tmp_path)
    assert_same_bits(weights(load_model(tmp_path)), weights(new_model()))
    assert set(contents(tmp_path)) == {"config.json", SINGLE_FILE}


# --- what stays and what goes ----------------------------------------------------------------


def test_stale_shards_go_and_files_of_others_stay(tmp_path: Path) -> None:
    others = {name: b"mine" for name in ("notes.json", "model_notes.safetensors", "adapter.safetensors")}
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    for shard_bytes in (MORE, FEW, ONE, FEW):
        save_model(old_model(), tmp_path, shard_bytes=shard_bytes)
        found = contents(tmp_path)
        assert others.items() <= found.items()
        shards = [name for name in found.keys() - others.keys() if name.endswith(".safetensors")]
        assert (SINGLE_FILE in shards) == (shard_bytes == ONE) == (len(shards) == 1)
        assert (INDEX_FILE in found) == (shard_bytes != ONE)
        assert_same_bits(weights(load_model(tmp_path)), weights(old_model()))
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (tmp_path / name).write_bytes(b"of an older model")
    save_model(
        new_model(), tmp_path, shard_bytes=FEW, beside=lambda to: (to / "tokenizer.json").write_bytes(b"new")
    )
    assert (tmp_path / "tokenizer.json").read_bytes() == b"new"
    assert contents(tmp_path).keys() - found.keys() == {"tokenizer.json"}
    (tmp_path / INDEX_FILE).unlink()
    with refused(CheckpointError, tmp_path, "has neither"):
        load_model(tmp_path)
