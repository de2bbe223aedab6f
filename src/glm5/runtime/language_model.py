"""A loaded model with its tokenizer, called as in `transformers`.

`model(input_ids).logits` and `model.generate(input_ids, ...)` take and give ids; `model.stream(...)`
and `model.complete(...)` take a string or chat messages and give text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm5.checkpoint import Checkpoint, save_model
from glm5.checkpoint.filling import SchemeOf
from glm5.config import ModelConfig
from glm5.errors import RequestError
from glm5.layers.loading import load_model
from glm5.model.transformer import GlmForCausalLM
from glm5.runtime.decoding import PREFILL_CHUNK, Row, decode, make_rows
from glm5.runtime.forking import answer_after_forks
from glm5.runtime.generation_config import (
    sampling_defaults,
    stated_eos_token_ids,
    write_generation_config,
)
from glm5.runtime.memory import keep_freed_memory
from glm5.runtime.sampling import SamplingParams
from glm5.runtime.speculation import SpeculationStats, decode_speculatively, speculation_obstacle
from glm5.text.control_tokens import GMASK, SOP
from glm5.text.stream import TextStream
from glm5.text.tokenizer import TOKENIZER_FILE, RenderedChat, Tokenizer

Prompt = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Completion:
    """A finished text: its ids without the prompt, and why it ended (`stop` or `length`)."""

    text: str
    ids: list[int]
    prompt_tokens: int
    finish_reason: str


@dataclass(frozen=True)
class ChatDefaults:
    """How a checkpoint is talked to: reasoning first or not, with earlier turns or each alone."""

    enable_thinking: bool = True
    remembers_turns: bool = True


class LanguageModel(GlmForCausalLM):
    """A GLM-5-family model with what generation needs. Made by `glm5.load` or `from_pretrained`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.tokenizer: Tokenizer | None = None
        # What the checkpoint's generation_config.json asks for when the caller does not.
        self.defaults = SamplingParams()

    @classmethod
    def load(
        cls,
        source: Path | Checkpoint,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        quantize: SchemeOf | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> LanguageModel:
        """Read weights, generation defaults and, where there is one, the tokenizer."""
        if torch.device(device).type == "cpu":
            keep_freed_memory()
            answer_after_forks()
        checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
        defaults, ends = sampling_defaults(checkpoint), stated_eos_token_ids(checkpoint)
        directory, tokenizer = checkpoint.directory, None
        if (directory / TOKENIZER_FILE).exists():
            tokenizer = Tokenizer.from_pretrained(directory)
        model = load_model(
            checkpoint, dtype=dtype, device=device, progress=progress, build=cls, quantize=quantize
        )
        model.defaults, model.tokenizer = defaults, tokenizer
        if ends:  # as in `transformers`, it counts before config.json
            model.config = model.config.with_changes(eos_token_id=ends)
        return model

    def save_pretrained(self, directory: str | Path, *, stored: str | None = None) -> None:
        """Write a directory that glm5, `transformers` and vLLM load; `stored` as in `save_model`.

        Weights, config, tokenizer and generation defaults appear together or not at all.
        """

        def beside(folder: Path) -> None:
            write_generation_config(folder, self.config, self.defaults)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)

        save_model(self, Path(directory), stored=stored, beside=beside)

    # ---------------------------------------------------------------- ids in, ids out

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        seed: int | None = None,
        use_mtp: bool = False,
        num_draft_tokens: int = 1,
        prefill_chunk: int = PREFILL_CHUNK,
        num_beams: int = 1,
        num_return_sequences: int = 1,
        use_cache: bool = True,
        streamer: Any = None,
        **unknown: Any,
    ) -> Tensor:
        """Continue each row; returns int64 [B, P + N], prompts in front, ended rows padded.

        input_ids: int64 [B, P]; attention_mask: [B, P], 0 on padding, on either side.
        max_new_tokens: None = up to `max_length` tokens with the prompt, or 20 new ones.
        do_sample: False = greedy; None = as generation_config.json says.
        eos_token_id: in place of the model's own; an empty list = never end early.
        seed: row i draws with seed + i; None = another result every time.
        use_mtp: speculate with the MTP layer (one greedy row; faster; the same tokens in fp32, nearly
            always in 16 bits).
        prefill_chunk: tokens of the prompt read in one pass; fewer take less memory.
        streamer: as in `transformers`: `put` with the prompt and each token of the one row, then `end`.
        num_beams, num_return_sequences, use_cache: for callers that state 1, 1 and True; others are refused.

        Raises:
            RequestError: an unknown or impossible parameter, or a prompt too long for the model.
        """
        stated = {"num_beams": (num_beams, 1), "num_return_sequences": (num_return_sequences, 1)}
        for name, (value, only) in (stated | {"use_cache": (use_cache, True)}).items():
            if value != only:
                raise RequestError(f"{name} is {value!r}; only {only} is supported")
        if unknown:
            raise RequestError(f"generate has no argument {sorted(unknown)[0]!r}")
        prompts = _unpadded(input_ids, attention_mask)
        if streamer is not None and len(prompts) != 1:
            raise RequestError(f"a streamer is for one row at a time, not {len(prompts)}")
        if max_new_tokens is None:
            max_new_tokens = 20 if max_length is None else max(0, max_length - input_ids.shape[1])
        if do_sample and temperature == 0:
            raise RequestError("do_sample=True and temperature=0 contradict each other; leave one out")
        wanted = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        wanted["repetition_penalty"] = repetition_penalty
        params = self._sampling(do_sample, max_new_tokens, {k: v for k, v in wanted.items() if v is not None})
        if eos_token_id is not None:
            ends = (eos_token_id,) if isinstance(eos_token_id, int) else eos_token_id
            params = params.with_changes(stop_token_ids=ends, ignore_eos=True)
        seeds = [None if seed is None else seed + i for i in range(len(prompts))]
        rows = make_rows(self, prompts, [params.with_changes(seed=s) for s in seeds])
        steps = self._decode(rows, use_mtp, num_draft_tokens, prefill_chunk)
        if streamer is None:
            for _ in steps:
                pass
        else:
            _feed_streamer(streamer, input_ids, rows[0], steps)
        pad = pad_token_id if pad_token_id is not None else self.config.pad_token_id
        pad = pad if pad is not None else next(iter(self.config.eos_token_ids), 0)
        longest = max(len(row.output_ids) for row in rows)
        new = [row.output_ids + [pad] * (longest - len(row.output_ids)) for row in rows]
        return torch.cat(
            (input_ids.cpu(), torch.tensor(new, dtype=torch.int64).view(len(rows), longest)), dim=1
        ).to(input_ids.device)

    # ---------------------------------------------------------------- text in, text out

    def stream(
        self,
        prompt: Prompt,
        *,
        enable_thinking: bool | None = None,
        use_mtp: bool | None = None,
        on_finish: Callable[[Completion], None] | None = None,
        **params: Any,
    ) -> Iterator[str]:
        """Yield the answer's text piece by piece, never half a character.

        prompt: text to continue, or chat messages (`[{"role": "user", "content": "..."}]`).
        enable_thinking: chat only; None = the checkpoint's default (on, as published).
        use_mtp: None = speculate where that cannot change the answer: greedy, in fp32.
        params: fields of `SamplingParams`; the rest comes from the checkpoint's defaults.
        on_finish: called with the whole completion after the last piece.

        Raises:
            RequestError, TemplateError: at once, before the first piece.
        """
        ids = self.prompt_ids(prompt, enable_thinking=enable_thinking)
        wanted = self.defaults.with_changes(**params)
        if not wanted.ignore_eos and (isinstance(prompt, RenderedChat) or not isinstance(prompt, str)):
            # A turn ends where the next one would begin, whatever the files name as end tokens.
            ends = (*wanted.stop_token_ids, *self._require_tokenizer().eos_token_ids)
            wanted = wanted.with_changes(stop_token_ids=ends)
        row = make_rows(self, [ids], [wanted])[0]
        if use_mtp is None:
            # In 16 bits it could change the answer.
            use_mtp = self.dtype == torch.float32 and speculation_obstacle(self, row) is None
        tokenizer = self._require_tokenizer()
        steps = self._decode([row], use_mtp, 1, PREFILL_CHUNK)
        return _stream(row, steps, TextStream(tokenizer, row.params.stop), on_finish)

    def complete(self, prompt: Prompt, **options: Any) -> Completion:
        """`stream` to the end."""
        done: list[Completion] = []
        heard = options.pop("on_finish", None)
        for _ in self.stream(prompt, on_finish=done.append, **options):
            pass
        if heard is not None:
            heard(done[0])
        return done[0]

    def prompt_ids(self, prompt: Prompt, *, enable_thinking: bool | None = None) -> list[int]:
        """The ids a prompt becomes: chat messages by the template, text behind [gMASK]<sop>."""
        tokenizer = self._require_tokenizer()
        if isinstance(prompt, RenderedChat):  # it brings its own frame
            return tokenizer.encode(prompt)
        if not isinstance(prompt, str):
            thinking = self.chat_defaults.enable_thinking if enable_thinking is None else enable_thinking
            ids: list[int] = tokenizer.apply_chat_template(prompt, enable_thinking=thinking)
            return ids
        start = [tokenizer.control_ids[name] for name in (GMASK, SOP) if name in tokenizer.control_ids]
        return start + tokenizer.encode(prompt)

    @property
    def chat_defaults(self) -> ChatDefaults:
        """What config.json says under `glm5_chat`, a key of ours that other readers pass over."""
        raw = self.config.extra.get("glm5_chat")
        raw = raw if isinstance(raw, Mapping) else {}
        return ChatDefaults(raw.get("enable_thinking") is not False, raw.get("remembers_turns") is not False)

    # ---------------------------------------------------------------- inside

    def _decode(
        self, rows: list[Row], use_mtp: bool, num_draft_tokens: int, prefill_chunk: int
    ) -> Iterator[list[Row]]:
        if not use_mtp:
            return decode(self, rows, prefill_chunk=prefill_chunk)
        if len(rows) != 1:
            raise RequestError(f"use_mtp is for one row at a time, not {len(rows)}")
        self.last_speculation = SpeculationStats()
        return decode_speculatively(
            self,
            rows[0],
            num_draft_tokens=num_draft_tokens,
            prefill_chunk=prefill_chunk,
            stats=self.last_speculation,
        )

    def _sampling(
        self, do_sample: bool | None, max_new_tokens: int, wanted: dict[str, Any]
    ) -> SamplingParams:
        params = self.defaults.with_changes(**wanted, max_new_tokens=max_new_tokens)
        if do_sample is False:
            return params.with_changes(temperature=0.0)
        if do_sample and params.temperature == 0:
            return params.with_changes(temperature=1.0)
        return params

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("the model has no tokenizer; load it from a directory with tokenizer.json")
        return self.tokenizer


def _stream(
    row: Row,
    steps: Iterator[list[Row]],
    text: TextStream,
    on_finish: Callable[[Completion], None] | None,
) -> Iterator[str]:
    given, pieces = 0, []
    for _ in steps:
        while given < len(row.output_ids) and not text.stopped:
            token = row.output_ids[given]
            given += 1
            if token in row.eos_ids:
                break
            piece = text.push(token)
            if text.stopped:
                row.finish_reason = "stop"  # also where the last allowed token brought it
            if piece:
                pieces.append(piece)
                yield piece
    rest = text.flush()
    if rest:
        pieces.append(rest)
        yield rest
    if on_finish is not None:
        reason = "stop" if text.stopped else row.finish_reason or "stop"
        on_finish(Completion("".join(pieces), row.output_ids[:given], len(row.prompt_ids), reason))


def _feed_streamer(streamer: Any, input_ids: Tensor, row: Row, steps: Iterator[list[Row]]) -> None:
    streamer.put(input_ids.cpu())
    given = 0
    for _ in steps:
        if len(row.output_ids) > given:
            streamer.put(torch.tensor(row.output_ids[given:]))
            given = len(row.output_ids)
    streamer.end()


def _unpadded(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or len(input_ids) == 0:
        raise RequestError("input_ids must be a tensor [batch, tokens]; use return_tensors='pt'")
    if input_ids.is_floating_point() or input_ids.is_complex():
        raise RequestError(f"input_ids is {input_ids.dtype}; token ids are integers")
    if attention_mask is None:
        rows: list[list[int]] = input_ids.tolist()
        return rows
    if not isinstance(attention_mask, Tensor):
        raise RequestError("attention_mask must be a tensor like input_ids; use return_tensors='pt'")
    if attention_mask.shape != input_ids.shape:
        raise RequestError(
            f"attention_mask has shape {list(attention_mask.shape)}, input_ids {list(input_ids.shape)}"
        )
    kept = attention_mask.bool().cpu()
    return [row[keep].tolist() for row, keep in zip(input_ids.cpu(), kept, strict=True)]
