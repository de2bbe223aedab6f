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
from glm5.kernels import cpu
from glm5.layers.loading import load_model
from glm5.model.transformer import GlmForCausalLM
from glm5.runtime.cache import PAGE_TOKENS
from glm5.runtime.engine import Engine, weights_version
from glm5.runtime.forking import answer_after_forks
from glm5.runtime.generation_config import (
    sampling_defaults,
    stated_eos_token_ids,
    write_generation_config,
)
from glm5.runtime.memory import keep_freed_memory
from glm5.runtime.request import Request, Result
from glm5.runtime.sampling_params import SamplingParams
from glm5.runtime.scheduler import Limits
from glm5.runtime.session import Session
from glm5.runtime.store import PageStore
from glm5.runtime.streams import Stream
from glm5.text.control_tokens import GMASK, SOP
from glm5.text.stream import TextStream
from glm5.text.tokenizer import TOKENIZER_FILE, RenderedChat, Tokenizer

Prompt = str | Sequence[Mapping[str, Any]]


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
        self._engine: Engine | None = None
        # Names the weights as they were loaded; None = they are no checkpoint's.
        self.fingerprint: str | None = None
        self._loaded = 0  # the version of the weights then

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
        model._loaded = weights_version(model)
        model.fingerprint = f"{checkpoint.fingerprint} {model.dtype} {'rounded' if quantize else 'stored'}"
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

    # ---------------------------------------------------------------- the engine

    @property
    def engine(self) -> Engine:
        """What runs this model's requests; made at the first call, and anew after a move or cast."""
        found = self._engine
        if found is None or (found.device, found.dtype) != (self.device, self.dtype):
            found = self._engine = Engine(self)
        return found

    def start_engine(
        self,
        *,
        cache_tokens: int | None = None,
        limits: Limits | None = None,
        cache_dir: str | Path | None = None,
        cache_dir_bytes: int = 8 << 30,
    ) -> Engine:
        """An engine with other sizes, which the model's calls use from now on.

        cache_tokens, limits: as of `Engine`. cache_dir: a folder for what was read of prompts, which outlives
        the process; it holds at most `cache_dir_bytes`.

        Raises:
            RequestError: a size is impossible, or the folder is another model's.
        """
        store = None
        if cache_dir is not None:
            if self.fingerprint is None or self._loaded != weights_version(self):
                raise RequestError(
                    "a cache folder is for models loaded from a checkpoint, and not changed or moved since"
                )
            try:
                folder = Path(cache_dir).expanduser()
            except (RuntimeError, TypeError) as error:
                raise RequestError(f"cache_dir is {cache_dir!r}: {error}") from None
            about = f"{self.fingerprint} {PAGE_TOKENS} {cpu.instruction_set()} {len(self.mtp)}"
            store = PageStore(folder, about, max_bytes=cache_dir_bytes)
        self._engine = Engine(self, cache_tokens=cache_tokens, limits=limits, store=store)
        return self._engine

    def session(self, ids: Sequence[int] = ()) -> Session:
        """A timeline that is kept between calls."""
        return Session(self.engine, ids)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engine": None}  # a copy gets its own

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
        use_mtp: bool | None = None,
        num_draft_tokens: int | None = None,
        num_beams: int = 1,
        num_return_sequences: int = 1,
        use_cache: bool = True,
        streamer: Any = None,
        stop_strings: str | Sequence[str] | None = None,
        **unknown: Any,
    ) -> Tensor:
        """Continue each row; returns int64 [B, P + N], prompts in front, ended rows padded.

        input_ids: int64 [B, P]; attention_mask: [B, P], 0 on padding, on either side.
        max_new_tokens: None = up to `max_length` tokens with the prompt, or 20 new ones.
        do_sample: False = greedy; None = as generation_config.json says.
        eos_token_id: in place of the model's own; an empty list = never end early.
        seed: row i draws with seed + i; None = another result every time.
        use_mtp: guess tokens with the MTP layer and check them in one step; None = where that pays and cannot
            change the text, False = never, True = always (on a GPU rounding may then change the text).
        num_draft_tokens: guesses a step; None = as many as pay.
        num_return_sequences: answers to each row, one below the other; the row is read once.
        stop_strings: texts that end a row, which needs the model's own tokenizer; the tokens that spell one
            stay, as in `transformers`.
        streamer: as in `transformers`: `put` with the prompt and each token of the one row, then `end`.
        num_beams, use_cache: for callers that state 1 and True; others are refused.

        Raises:
            RequestError: an unknown or impossible parameter, or a prompt too long for the model.
        """
        for name, value, only in (("num_beams", num_beams, 1), ("use_cache", use_cache, True)):
            if value != only:
                raise RequestError(f"{name} is {value!r}; only {only} is supported")
        # A tokenizer is stated beside stop_strings; the model's own is used.
        unknown = {name: value for name, value in unknown.items() if name != "tokenizer"}
        if unknown:
            raise RequestError(f"generate has no argument {sorted(unknown)[0]!r}")
        stops = SamplingParams(stop=() if stop_strings is None else stop_strings).stop  # type: ignore[arg-type]
        prompts = _unpadded(input_ids, attention_mask)
        if type(num_return_sequences) is not int or num_return_sequences < 1:
            raise RequestError(
                f"num_return_sequences is {num_return_sequences!r}; it must be an integer from 1"
            )
        if streamer is not None and len(prompts) * num_return_sequences != 1:
            count = len(prompts) * num_return_sequences
            raise RequestError(f"a streamer is for one row at a time, not {count}")
        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise RequestError(f"streamer is {streamer!r}; it must have put and end")
        for name, given in (("max_length", max_length), ("pad_token_id", pad_token_id)):
            if given is not None and (type(given) is not int or given < 0):
                raise RequestError(f"{name} is {given!r}; it must be an integer from 0")
        SamplingParams(seed=seed)
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
        drafts = self._draft_tokens(use_mtp, num_draft_tokens)
        rows: list[Request] = []
        try:
            for number, prompt in enumerate(prompts):
                own = params.with_changes(
                    seed=None if seed is None else (seed + number * num_return_sequences) % 2**63
                )
                where = f"prompt {number}" if len(prompts) > 1 else "the prompt"
                rows += self.engine.submit_all(
                    prompt, own, num_return_sequences, num_draft_tokens=drafts, where=where, waits=True
                )
            if streamer is not None:
                _feed_streamer(streamer, input_ids, self.engine.outputs(rows[0]))
            results = [self._finish(row, stops) for row in rows]
        finally:
            for row in rows:
                if not row.finished:
                    self.engine.cancel(row)
        pad = pad_token_id if pad_token_id is not None else self.config.pad_token_id
        pad = pad if pad is not None else next(iter(self.config.eos_token_ids), 0)
        longest = max(len(result.ids) for result in results)
        new = [result.ids + [pad] * (longest - len(result.ids)) for result in results]
        prompts_BP = input_ids.cpu().repeat_interleave(num_return_sequences, dim=0)
        return torch.cat(
            (prompts_BP, torch.tensor(new, dtype=torch.int64).view(len(new), longest)), dim=1
        ).to(input_ids.device)

    # ---------------------------------------------------------------- text in, text out

    def stream(
        self,
        prompt: Prompt,
        *,
        enable_thinking: bool | None = None,
        use_mtp: bool | None = None,
        num_draft_tokens: int | None = None,
        priority: int = 0,
        on_finish: Callable[[Result], None] | None = None,
        **params: Any,
    ) -> Iterator[str]:
        """Yield the answer's text piece by piece, never half a character.

        prompt: text to continue, or chat messages (`[{"role": "user", "content": "..."}]`).
        enable_thinking: chat only; None = the checkpoint's default (on, as published).
        use_mtp, num_draft_tokens: as in `generate`. priority: before other threads' requests.
        params: fields of `SamplingParams`; the rest comes from the checkpoint's defaults.
        on_finish: called with the whole answer after the last piece. Closing the generator ends the request.

        Raises:
            RequestError, TemplateError: at once, before the first piece.
        """
        ids = self.prompt_ids(prompt, enable_thinking=enable_thinking)
        is_text = isinstance(prompt, str) and not isinstance(prompt, RenderedChat)
        start = self.stream_ids if is_text else self.stream_chat
        return start(
            ids, use_mtp=use_mtp, num_draft_tokens=num_draft_tokens, priority=priority, on_finish=on_finish,
            **params,
        )  # fmt: skip

    def stream_chat(self, ids: Sequence[int], **options: Any) -> Iterator[str]:
        """`stream` of a rendered conversation, which ends where the next turn would begin."""
        ends = options.pop("stop_token_ids", ())
        if not options.get("ignore_eos"):
            ends = (*ends, *self._require_tokenizer().eos_token_ids)
        return self.stream_ids(ids, stop_token_ids=ends, **options)

    def stream_ids(
        self,
        ids: Sequence[int],
        *,
        use_mtp: bool | None = None,
        num_draft_tokens: int | None = None,
        priority: int = 0,
        on_finish: Callable[[Result], None] | None = None,
        **params: Any,
    ) -> Iterator[str]:
        """`stream` of a prompt whose ids are known."""
        wanted = self.defaults.with_changes(**params)
        if on_finish is not None and not callable(on_finish):
            raise RequestError(f"on_finish is {on_finish!r}; it must be a function")
        drafts = self._draft_tokens(use_mtp, num_draft_tokens)
        text = TextStream(self._require_tokenizer(), wanted.stop)
        request = self.engine.submit(ids, wanted, num_draft_tokens=drafts, priority=priority)
        engine = self.engine
        pieces = _stream(request, engine.outputs(request), text, on_finish)
        return Stream(pieces, lambda: engine.cancel(request))

    def complete(self, prompt: Prompt, **options: Any) -> Result:
        """`stream` to the end."""
        done: list[Result] = []
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

    def _draft_tokens(self, use_mtp: bool | None, num_draft_tokens: int | None) -> int | None:
        """Guesses a step, as the engine takes them."""
        if num_draft_tokens is not None and (type(num_draft_tokens) is not int or num_draft_tokens < 1):
            raise RequestError(f"num_draft_tokens is {num_draft_tokens!r}; it must be an integer from 1")
        if not use_mtp:
            return 0 if use_mtp is False else num_draft_tokens
        if not self.mtp:
            raise RequestError("the checkpoint has no MTP layer; decode without use_mtp")
        if self.config.attention_mask_type == "prefix":
            raise RequestError("speculation does not know prefix attention; decode without use_mtp")
        return num_draft_tokens or 1

    def _finish(self, request: Request, stops: tuple[str, ...]) -> Result:
        """Run to the end, or to the token with which a stop string is complete."""
        text = TextStream(self._require_tokenizer(), stops) if stops else None
        steps, given = self.engine.outputs(request), 0
        for new in steps:
            for token in new if text is not None else ():
                given += 1
                text.push(token)  # type: ignore[union-attr]
                if text.stopped:  # type: ignore[union-attr]
                    steps.close()  # type: ignore[attr-defined]
                    return Result(request.output_ids[:given], "stop", request.statistics)
        return request.result()

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
    request: Request,
    steps: Iterator[list[int]],
    text: TextStream,
    on_finish: Callable[[Result], None] | None,
) -> Iterator[str]:
    given, pieces = 0, []
    try:
        for new in steps:
            for token in new:
                given += 1
                if token in request.eos_ids:
                    break
                piece = text.push(token)
                if piece:
                    pieces.append(piece)
                    yield piece
                if text.stopped:
                    break
            if text.stopped:
                break
    finally:
        steps.close()  # type: ignore[attr-defined]  # ends the request, where it is not finished
    rest = text.flush()
    if rest:
        pieces.append(rest)
        yield rest
    if on_finish is not None:
        reason = "stop" if text.stopped else request.finish_reason or "stop"
        ids, choices = request.output_ids[:given], request.choices[:given]
        on_finish(Result(ids, reason, request.statistics, "".join(pieces), choices))


def _feed_streamer(streamer: Any, input_ids: Tensor, steps: Iterator[list[int]]) -> None:
    streamer.put(input_ids.cpu())
    for new in steps:
        streamer.put(torch.tensor(new))
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
