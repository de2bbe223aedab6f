"""The text that a calibrated job reads, as windows of token ids.

The shipped text is English, Chinese and code; `calibration_text/README.md` says where it is from. It shares
nothing with the held-out texts, which are for judging.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from glm5.errors import CheckpointError, RecipeError
from glm5.quantize.sources import WeightSource, open_source
from glm5.text.control_tokens import GMASK, SOP
from glm5.text.tokenizer import TOKENIZER_FILE, Tokenizer

METHODS = ("nearest", "gptq")
DEFAULT_TOKENS = 16384
WINDOW = 512
# A text that gives fewer tokens than this says nothing about a model.
FEWEST_TOKENS = 128


@dataclass(frozen=True)
class Calibration:
    """What the layers see while their weights are rounded.

    input_ids: windows of token ids, each read by itself. dampening_frac: of the mean of a Hessian's
    diagonal, added to it (GPTQ section 3.3: 0.01).

    Raises RecipeError for windows without tokens and a dampening_frac that is not in (0, 1].
    """

    input_ids: tuple[tuple[int, ...], ...]
    dampening_frac: float = 0.01

    def __post_init__(self) -> None:
        if not self.input_ids or not all(self.input_ids):
            raise RecipeError("calibration without tokens is not possible; give at least one window of ids")
        if not 0 < self.dampening_frac <= 1:
            raise RecipeError(f"dampening_frac {self.dampening_frac} is not possible; 0.01 is usual")

    @classmethod
    def from_texts(
        cls,
        tokenizer: Tokenizer,
        texts: Sequence[str] | None = None,
        num_tokens: int = DEFAULT_TOKENS,
        max_seq_length: int = WINDOW,
    ) -> Calibration:
        """The first `num_tokens` tokens of texts (None = the shipped one), in windows.

        Every window begins as the model's prompts do, with [gMASK]<sop>, if the tokenizer has them.
        Raises RecipeError when the texts give too few tokens or the numbers are impossible.
        """
        if num_tokens < FEWEST_TOKENS or max_seq_length < 8:
            raise RecipeError(
                f"{num_tokens} calibration tokens in windows of {max_seq_length} are too few; "
                f"use at least {FEWEST_TOKENS} in windows of 8"
            )
        ids = [i for found in tokenizer.encode_batch(list(texts or [shipped_text()])) for i in found]
        if len(ids) < FEWEST_TOKENS:
            raise RecipeError(
                f"the calibration text gives {len(ids)} tokens; give at least {FEWEST_TOKENS}, better 10000"
            )
        start = [tokenizer.control_ids[name] for name in (GMASK, SOP) if name in tokenizer.control_ids]
        step = max_seq_length - len(start)
        ids = ids[:num_tokens]
        windows = [(*start, *ids[first : first + step]) for first in range(0, len(ids), step)]
        return cls(tuple(windows))

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.input_ids))

    def as_dict(self) -> dict[str, object]:
        """What must be the same for a half-done job to go on."""
        digest = hashlib.sha256(repr(self.input_ids).encode()).hexdigest()
        return {
            "method": "gptq", "calibration_tokens": self.num_tokens, "windows": len(self.input_ids),
            "sha256": digest, "dampening_frac": self.dampening_frac,
        }  # fmt: skip


def shipped_text() -> str:
    path = resources.files("glm5.text").joinpath("samples", "default.txt")
    return path.read_text(encoding="utf-8")


def read_texts(files: Sequence[Path]) -> list[str]:
    """UTF-8 text files, in order. Raises RecipeError naming the file that cannot be read."""
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise RecipeError(f"{file}: is not UTF-8 text (byte {error.start}); convert it first") from None
        except OSError as error:
            raise RecipeError(f"{file}: cannot be read ({error.strerror})") from None
    return texts


def calibration_of(
    source: Path, method: str, files: Sequence[Path], num_tokens: int | None
) -> Calibration | None:
    """From a command line; None = the method needs none. Raises RecipeError for what does not go together."""
    if method not in METHODS:
        raise RecipeError(f"--method {method!r} is unknown; use {' or '.join(METHODS)}")
    if method == "nearest":
        if files or num_tokens is not None:
            raise RecipeError("a calibration text is of no use to --method nearest; add --method gptq")
        return None
    texts = read_texts(files) if files else None
    tokenizer = tokenizer_of(open_source(source))
    return Calibration.from_texts(tokenizer, texts, DEFAULT_TOKENS if num_tokens is None else num_tokens)


def tokenizer_of(source: WeightSource) -> Tokenizer:
    """The tokenizer that comes with the weights; CheckpointError when there is none."""
    files = source.side_files()
    if TOKENIZER_FILE not in files:
        raise CheckpointError(
            f"{source.path}: has no {TOKENIZER_FILE}, so no calibration text can be read; "
            "copy it there, or give Calibration(input_ids)"
        )
    with tempfile.TemporaryDirectory() as folder:
        for name in (TOKENIZER_FILE, "tokenizer_config.json"):
            if name in files:
                (Path(folder) / name).write_bytes(files[name])
        return Tokenizer.from_pretrained(folder)
