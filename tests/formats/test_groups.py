"""Which module belongs to which group, against compressed-tensors' own matching."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5.errors import CheckpointError
from glm5.formats import CompressedTensors, Group
from glm5.formats.patterns import MAX_LENGTH, MAX_PATTERNS, NamePattern
from tests.checkpoint.checkpoint_fixture import refused
from tests.formats.format_fixture import CONFIG, MODULE, form

many = settings(max_examples=150, deadline=None)
NAMES = [
    MODULE, "model.layers.3.mlp.gate", "model.layers.30.mlp.up_proj", "model.layers.0.self_attn.q_a_proj",
    "model.layers.0.self_attn.indexer.wk", "lm_head", "model.layers.3.mlp.shared_experts.up_proj",
]  # fmt: skip
TARGETS = [
    "Linear", *NAMES[:3], "re:.*mlp.*", "re:.*experts\\.\\d+\\.(gate|up)_proj", "re:model.layers.3",
    "re:.*mlp.gate$", "re:^(?!.*experts).*", "re:^(?!.*self_attn)(?=.*layers).*_proj$", "re:lm_head",
    "re:.*layers\\.(0|30)\\..*", "re:", "nothing", "Conv2d",
]  # fmt: skip


def groups(entries: list[list[str]], ignore: list[str]) -> CompressedTensors:
    weights = {"num_bits": 4, "type": "int", "strategy": "channel"}
    found = form(
        quant_method="compressed-tensors",
        format="pack-quantized",
        config_groups={
            f"group_{n}": {"targets": targets, "weights": weights} for n, targets in enumerate(entries)
        },
        ignore=ignore,
    )
    assert isinstance(found, CompressedTensors)
    return found


def name_of(group: Group | None) -> str | None:
    return group.name if group else None


@many
@given(
    st.lists(st.lists(st.sampled_from(TARGETS), max_size=4), min_size=1, max_size=4),
    st.lists(st.sampled_from(TARGETS), max_size=2),
)
def test_a_module_gets_the_group_that_the_library_gives_it(
    entries: list[list[str]], ignore: list[str]
) -> None:
    match = pytest.importorskip("compressed_tensors.utils.match")
    linear, by_target = torch.nn.Linear(1, 1), {}
    for number, targets in enumerate(entries):
        by_target.update(dict.fromkeys(targets, f"group_{number}"))
    ours = groups(entries, ignore)
    for name in NAMES:
        fits = match.is_match(name, linear, by_target, ignore)
        wanted = by_target[match.match_targets(name, linear, by_target)[0]] if fits else None
        assert name_of(ours.group_of(name)) == wanted, name


def test_the_embedding_is_not_linear() -> None:
    embedding = "model.embed_tokens"
    assert groups([["Linear"]], []).group_of(embedding) is None
    assert name_of(groups([["Linear"], ["Embedding"]], []).group_of(embedding)) == "group_1"
    assert name_of(groups([["Linear", embedding]], []).group_of(embedding)) == "group_0"


# --- patterns -------------------------------------------------------------------------------------

pieces = st.sampled_from(
    [
        "a", "b", "\\.", ".", ".*", "a+", "(a|b)", "(a|bb)*", "[ab]", "[^a]", "[]a]", "[^]|(]", "b?", "^",
        "$", "|", "\\d", "a{2}", "(?:ab)", "\\(", "\\|",
    ]
)  # fmt: skip


@many
@given(
    st.lists(
        st.tuples(st.sampled_from(["(?!", "(?=", "^(?!"]), st.lists(pieces, max_size=4).map("".join)),
        max_size=2,
    ),
    st.lists(pieces, max_size=5).map("".join),
    st.lists(st.text("ab.(|1]", max_size=8), min_size=5, max_size=5),
)
def test_patterns_mean_what_they_mean_in_python(
    conditions: list[tuple[str, str]], rest: str, names: list[str]
) -> None:
    text = "".join(f"{opening}{condition})" for opening, condition in conditions) + rest
    try:
        pattern = NamePattern(text)
    except ValueError:
        # Only what has another meaning behind a look-ahead may be refused.
        assert not is_python(text) or (conditions and "|" in rest) or re.search(r"[*+?}$^][*+?{]", text)
        return
    for name in names:
        assert pattern.matches(name) == (re.match(text, name) is not None), (text, name)


def is_python(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


@pytest.mark.parametrize(
    "evil", ["(a+)+$", "(a|a)*$", "(.*.*.*.*.*.*.*)*x", "(?!(a*)*$)b", "(a?){200}a{200}"]
)
def test_no_pattern_takes_long(evil: str) -> None:
    assert not NamePattern(evil).matches("a" * 100 + "!")


BAD = {
    "(": "unclosed", ")": "unopened", "a)|(b": "unopened", "a)(b": "unopened", "*": "repetition",
    "[a": "unclosed", "a{99999999999}": "", "\\w{1000}": "size limit", "(?<=a)b": "look-", "(a)\\1": "",
    "a(?!b)c": "look-", "(?!a": "unclosed", "(?!a)b|c": "look-ahead", "(?!a)*b": "look-ahead",
    "x" * (MAX_LENGTH + 1): "longer", "(?!" * 100: "unclosed", "\\": "", "(" * 300 + ")" * 100: "",
    "\ud800(": "", "a\n(": "unclosed", "(?P<a\u202e>": "",
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", ["targets", "ignore"])
def test_a_bad_pattern_is_refused_where_it_stands(bad: str, place: str) -> None:
    targets = ["re:" + bad] if place == "targets" else ["Linear"]
    with refused(CheckpointError, CONFIG, "quantization_config", place, BAD[bad]):
        groups([targets], ["re:" + bad] if place == "ignore" else [])


def test_too_many_patterns_are_refused() -> None:
    each = MAX_PATTERNS // 2
    entries = [[f"re:{n}" for n in range(each)], [f"re:x{n}" for n in range(each)]]
    assert groups(entries, []).group_of("x3") is not None
    with refused(CheckpointError, CONFIG, MAX_PATTERNS):
        groups(entries, ["re:one more"])
