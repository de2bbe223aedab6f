"""Messages are one printable line, whatever a file put into them."""

from __future__ import annotations

import pytest

from glm5.errors import CheckpointError


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("a\nb", r"a\nb"),
        ("\x1b]52;c;b3duZWQ=\x07", r"\x1b]52;c;b3duZWQ=\x07"),
        ("\ud800", r"\ud800"),
        ("模型 é", "模型 é"),
    ],
)
def test_what_a_terminal_would_obey_is_spelt_out(given: str, shown: str) -> None:
    assert str(CheckpointError(given)) == shown


def test_a_value_of_megabytes_is_cut_in_the_middle() -> None:
    assert len(str(CheckpointError("\0" * 1999))) <= 2000
    message = str(CheckpointError("begin " + "x" * 10_000_000 + " end"))
    assert message.startswith("begin xx")
    assert message.endswith("xx end")
    assert len(message) <= 2000
