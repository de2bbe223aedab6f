"""Text to ids and back: the checkpoint's byte-level BPE, its chat format, and streaming.

Knows tokenizer.json, tokenizer_config.json and chat_template.jinja of a checkpoint directory;
what a user writes is encoded by a vocabulary without control tokens, so it can never become one.
Leaves the chat formats to `chat/template` and unproven templates to `chat/own`.
"""

from __future__ import annotations

import codecs
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm5.disk.files import write_atomic
from glm5.disk.json_file import read_json, read_text
from glm5.errors import TemplateError, TokenizerError
from glm5.text.chat.own import render_own
from glm5.text.chat.template import (
    DIALECTS,
    SOFT_SWITCH,
    Dialect,
    Piece,
    known_dialect,
    pieces_to_text,
    render,
    template_sha256,
)
from glm5.text.control_tokens import ENDOFTEXT, EOS_TOKENS

if TYPE_CHECKING:
    import tokenizers
    import torch

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
MODEL_CONFIG_FILE = "config.json"

# Ten times the published files (20 MB, 10 kB, 11 kB), so that a wrong file is refused unread.
_MAX_BYTES = {TOKENIZER_FILE: 256 << 20, CONFIG_FILE: 16 << 20, TEMPLATE_FILE: 1 << 20}


# Arguments of the function of this name in `transformers` that are no variables of a template.
_NOT_SUPPORTED = (
    "chat_template", "continue_final_message", "truncation", "padding", "max_length",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip


class RenderedChat(str):
    """A rendered prompt that remembers which of its characters are the frame's control tokens.

    A `str` for printing and comparing; `Tokenizer` encodes it exactly. Anything made from it by
    slicing or adding is a plain string again, whose control tokens are only text.
    """

    pieces: tuple[Piece, ...]

    def __new__(cls, pieces: Iterable[Piece]) -> RenderedChat:
        pieces = tuple(pieces)
        chat = super().__new__(cls, pieces_to_text(pieces))
        chat.pieces = pieces
        return chat

    def __reduce__(self) -> tuple[Any, ...]:
        return RenderedChat, (self.pieces,)


class BatchEncoding(dict[str, Any]):
    """`input_ids` and `attention_mask` as a dict whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: torch.device | str) -> BatchEncoding:
        """The same with every tensor on `device`."""
        moved = {k: v.to(device) if hasattr(v, "to") else v for k, v in self.items()}
        return BatchEncoding(moved)


class Tokenizer:
    """A GLM tokenizer: byte-level BPE, control tokens by id, chat prompts by dialect."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        dialect: Dialect | None = None,
        source: str = TOKENIZER_FILE,
    ) -> None:
        """Wrap a `tokenizers.Tokenizer`.

        `config` holds tokenizer_config.json's keys. `dialect` overrides what `chat_template`
        says about the chat format. `source` names the tokenizer in errors. Raises
        TokenizerError when it is not a byte-level BPE.
        """
        for part, wanted in (("model", "BPE"), ("decoder", "ByteLevel")):
            found = type(getattr(backend, part)).__name__
            if found != wanted:
                raise TokenizerError(f"{source}: {part} is {found}, not {wanted} as in GLM")
        if dialect is not None and dialect not in DIALECTS:
            raise TokenizerError(f"dialect {dialect!r} is unknown; known: {', '.join(DIALECTS)}")
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.config = dict(config or {})
        self.chat_template = chat_template
        self.thinks = True  # does a chat begin with reasoning when nobody says?
        self.tool_template: str | None = None  # another template for chats with tools, an older habit
        self.source = source
        self.dialect = dialect or (known_dialect(chat_template) if chat_template else None)
        self._text_backend = _without_added_tokens(backend)
        added = backend.get_added_tokens_decoder()
        # Every added token is a control token, flagged "special" or not: in published GLM
        # files <think> and <tool_call> are not.
        self.control_ids: dict[str, int] = {token.content: i for i, token in added.items()}
        self._skipped_ids = frozenset(i for i, token in added.items() if token.special)
        self._control_id_set = frozenset(self.control_ids.values())
        self.eos_token_ids = self._find_eos()
        self.pad_token_id = self._find_pad()

    # --- files -----------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, dialect: Dialect | None = None) -> Tokenizer:
        """Read the tokenizer of a checkpoint directory.

        A missing, damaged or oversized file is a TokenizerError that names it. A chat template
        that no dialect is proven to equal is announced in the log and later rendered in a
        sandbox, unless `dialect` says which format to use.
        """
        import tokenizers

        directory = Path(directory)
        path = directory / TOKENIZER_FILE
        text = read_text(path, limit=_MAX_BYTES[TOKENIZER_FILE], error=TokenizerError)
        _refuse_what_aborts(path, text)
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in Rust is not an Exception
            reason = " ".join(str(error).split())[:200]
            raise TokenizerError(f"{path}: not a tokenizer: {reason}; download it again") from None
        config = _read_config(directory / CONFIG_FILE)
        configured = config.pop("chat_template", None)
        template = _read_template(directory / TEMPLATE_FILE, configured)
        tokenizer = cls(backend, config=config, chat_template=template, dialect=dialect, source=str(path))
        tokenizer.thinks = _thinks(directory / MODEL_CONFIG_FILE)
        if not (directory / TEMPLATE_FILE).exists():
            tokenizer.tool_template = _named(configured).get("tool_use")
        if template is not None and tokenizer.dialect is None:
            logger.warning(
                "%s: chat template %s is not one that glm5 knows; it will run in a sandbox, "
                "and messages that spell control tokens will be refused",
                directory,
                template_sha256(template)[:12],
            )
        return tokenizer

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the files that glm5 and transformers' AutoTokenizer read, each one atomically."""
        directory = Path(directory)
        # auto_map would name Python code to run; nothing executes from a checkpoint.
        config = {k: v for k, v in self.config.items() if k != "auto_map"}
        config |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        }
        config.setdefault("model_max_length", 202752)
        if self.eos_token_ids:
            config.setdefault("eos_token", self.id_to_token(self.eos_token_ids[0]))
        if self.pad_token_id is not None:
            config.setdefault("pad_token", self.id_to_token(self.pad_token_id))
        write_atomic(directory / TOKENIZER_FILE, self.backend.to_str())
        write_atomic(directory / CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False))
        if self.chat_template is not None:
            write_atomic(directory / TEMPLATE_FILE, self.chat_template)

    # --- vocabulary ------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.vocab_size

    @cached_property
    def vocab_size(self) -> int:
        """Rows an embedding needs: the highest id plus one, control tokens included."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def token_to_id(self, token: str) -> int | None:
        """The id of a vocabulary entry, control tokens included; None when there is none."""
        found: int | None = self.backend.token_to_id(token)
        return found

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary entry of an id (bytes as printable characters), or None."""
        try:
            found: str | None = self.backend.id_to_token(token_id)
        except OverflowError:
            return None
        return found

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes:
        """The bytes an id stands for; none for an id without a token or a skipped one."""
        if skip_special_tokens and token_id in self._skipped_ids:
            return b""
        token = self.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(_BYTE_OF[character] for character in token)
        except KeyError:  # a control token spelt with characters beyond the byte alphabet
            return token.encode("utf-8")

    def _find_eos(self) -> tuple[int, ...]:
        names = [name for name in EOS_TOKENS if name in self.control_ids]
        configured = _token_name(self.config.get("eos_token"))
        if configured in self.control_ids and configured not in names:
            names.append(configured)
        return tuple(self.control_ids[name] for name in names)

    def _find_pad(self) -> int | None:
        configured = _token_name(self.config.get("pad_token"))
        return self.control_ids.get(configured, self.control_ids.get(ENDOFTEXT))

    # --- as in transformers ----------------------------------------------------------------

    padding_side = "left"

    @property
    def eos_token_id(self) -> int | None:
        """The configured end token's id, else the first that ends a turn; `eos_token_ids` has all."""
        configured = self.control_ids.get(_token_name(self.config.get("eos_token")))
        return configured if configured is not None else next(iter(self.eos_token_ids), None)

    @property
    def eos_token(self) -> str | None:
        return self._token(self.eos_token_id)

    @property
    def pad_token(self) -> str | None:
        return self._token(self.pad_token_id)

    @property
    def bos_token(self) -> str | None:
        return _token_name(self.config.get("bos_token")) or None

    @property
    def bos_token_id(self) -> int | None:
        """None for GLM, whose texts begin with two tokens of their own."""
        return self.control_ids.get(self.bos_token or "")

    @property
    def all_special_ids(self) -> list[int]:
        """What `skip_special_tokens` leaves out."""
        return sorted(self._skipped_ids)

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, control tokens included."""
        return dict(self.backend.get_vocab(with_added_tokens=True))

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a token, or of each of a list; None for what is no token."""
        if isinstance(tokens, str):
            return self.backend.token_to_id(tokens)
        return [self.backend.token_to_id(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """The token of an id, or of each of a list; None for what is no id."""
        return self._token(ids) if isinstance(ids, int) else [self._token(i) for i in ids]

    def _token(self, token_id: int | None) -> str | None:
        if token_id is None or not 0 <= token_id < 1 << 32:
            return None
        found: str | None = self.backend.id_to_token(token_id)
        return found

    # --- text ------------------------------------------------------------------------------

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """The ids of a text.

        Control tokens spelt in `text` stay text unless `allow_special`; a RenderedChat keeps
        the control tokens of its frame either way. Raises TokenizerError for a lone surrogate.
        """
        if isinstance(text, RenderedChat):
            return self._encode_pieces(text.pieces)
        if not isinstance(text, str):
            raise TokenizerError(f"text to encode must be a string, not {type(text).__name__}")
        if allow_special:
            return self._ids(self.backend, text)
        ids = self._ids(self._text_backend, text)
        if self._control_id_set.isdisjoint(ids):
            return ids
        # Only a vocabulary that also holds a control token as a word gets here. One character
        # alone is never a control token, so this is text for certain.
        return [i for character in text for i in self._ids(self._text_backend, character)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many plain texts, on all cores."""
        try:
            rows = self._text_backend.encode_batch(list(texts), add_special_tokens=False)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # also a panic in Rust
            return [self.encode(text) for text in texts]  # names what is wrong
        return [
            row.ids if self._control_id_set.isdisjoint(row.ids) else self.encode(text)
            for row, text in zip(rows, texts, strict=True)
        ]

    def _ids(self, backend: tokenizers.Tokenizer, text: str) -> list[int]:
        try:
            ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in Rust is not an Exception
            at = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if at is not None:
                raise TokenizerError(f"text is not valid Unicode: lone surrogate at character {at}") from None
            reason = " ".join(str(error).split())[:200]
            raise TokenizerError(f"{self.source}: cannot encode a text with it: {reason}") from None
        return ids

    def _encode_pieces(self, pieces: Iterable[Piece]) -> list[int]:
        ids: list[int] = []
        pending = ""  # text that touches is encoded in one go, as it is in a whole prompt
        for piece in pieces:
            token_id = self.control_ids.get(piece.text) if piece.control else None
            if token_id is None:
                if piece.control and piece.text != SOFT_SWITCH:
                    raise TokenizerError(
                        f"{self.source}: lacks the control token {piece.text!r}, which the chat format needs"
                    )
                pending += piece.text
                continue
            if pending:
                ids += self.encode(pending)
                pending = ""
            ids.append(token_id)
        return ids + self.encode(pending) if pending else ids

    def decode(self, ids: int | Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ids (a list, tensor or single id); invalid UTF-8 becomes U+FFFD.

        Ids without a token give nothing. `skip_special_tokens` skips what tokenizer.json flags
        as special, like transformers; in published GLM files that spares <think>.
        """
        if hasattr(ids, "tolist"):
            ids = ids.tolist()
        try:
            listed = [ids] if isinstance(ids, int) else list(ids)
            text: str = self.backend.decode(listed, skip_special_tokens=skip_special_tokens)
        except (TypeError, OverflowError) as error:
            raise TokenizerError(f"ids to decode must be whole numbers >= 0: {error}") from None
        return text

    def batch_decode(
        self, batch: Iterable[int | Iterable[int]], skip_special_tokens: bool = True
    ) -> list[str]:
        """`decode` for each row."""
        return [self.decode(row, skip_special_tokens) for row in batch]

    def stream_decoder(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A fresh incremental decoder for one sequence."""
        return StreamDecoder(self, skip_special_tokens)

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        allow_special: bool = False,
        add_special_tokens: bool = True,
        return_token_type_ids: bool = False,
        **unknown: Any,
    ) -> BatchEncoding:
        """Encode one text or several: `input_ids` and `attention_mask`.

        One text without `return_tensors` gives flat lists; `return_tensors="pt"` gives int64
        tensors [B, T]. Padding is on the left, where generation wants it.
        padding: True or "longest", "max_length", or False or "do_not_pad", as in `transformers`.
        truncation: keep the first `max_length` ids. add_special_tokens: changes nothing; GLM adds none.

        Raises TokenizerError for an argument or value that is none of these.
        """
        if unknown or return_token_type_ids:
            name = sorted(unknown)[0] if unknown else "return_token_type_ids"
            raise TokenizerError(f"the tokenizer has no argument {name!r}; leave it out")
        if padding not in (True, False, "longest", "max_length", "do_not_pad"):
            raise TokenizerError(f"padding is {padding!r}; use True, 'max_length' or False")
        if truncation not in (True, False, "longest_first", "do_not_truncate"):
            raise TokenizerError(f"truncation is {truncation!r}; use True or False")
        truncation = truncation in (True, "longest_first")
        needs_length = truncation or padding == "max_length"
        if needs_length and (type(max_length) is not int or max_length < 1):
            raise TokenizerError(
                f"max_length is {max_length!r}; truncation and padding need a positive integer"
            )
        single = isinstance(text, str)
        if not isinstance(text, str) and not isinstance(text, Sequence):
            raise TokenizerError(f"text is {text!r}; give a string, or a list of strings")
        texts = [text] if isinstance(text, str) else list(text)
        rows = [self.encode(row, allow_special=allow_special) for row in texts]
        if truncation:
            rows = [row[:max_length] for row in rows]
        masks = [[1] * len(row) for row in rows]
        longest = max(map(len, rows), default=0)
        if padding == "max_length":
            longest = max(longest, max_length or 0)
        if padding not in (False, "do_not_pad") and any(len(row) < longest for row in rows):
            if self.pad_token_id is None:
                raise TokenizerError(f"{self.source}: has no pad token; encode texts one by one")
            masks = [[0] * (longest - len(mask)) + mask for mask in masks]
            rows = [[self.pad_token_id] * (longest - len(row)) + row for row in rows]
        if return_tensors is None:
            first = slice(None) if not single else 0
            return BatchEncoding(input_ids=rows[first], attention_mask=masks[first])
        return BatchEncoding(
            input_ids=_tensor(rows, return_tensors), attention_mask=_tensor(masks, return_tensors)
        )

    # --- chat ------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        enable_thinking: bool | None = None,
        clear_thinking: bool | None = None,
        reasoning_effort: str | None = None,
        return_tensors: str | None = None,
        return_dict: bool = False,
        **extra: Any,
    ) -> Any:
        """The prompt of a conversation: ids, or a RenderedChat string when not `tokenize`.

        enable_thinking: None = as the checkpoint says, on where it says nothing.
        Arguments as in `chat_template.render`; `extra` reaches unknown templates only.
        `return_tensors="pt"` gives [1, T]; `return_dict` gives a BatchEncoding. Raises
        TemplateError naming the message and key that cannot be rendered.
        """
        if enable_thinking is None:
            enable_thinking = self.thinks
        if self.dialect is None or (tools and self.tool_template is not None):
            options = extra | {
                "add_generation_prompt": add_generation_prompt,
                "enable_thinking": enable_thinking,
                "clear_thinking": clear_thinking,
                "reasoning_effort": reasoning_effort,
            }
            pieces = self._own_pieces(messages, tools, options)
        elif extra:
            raise TemplateError(f"chat template has no option {sorted(extra)[0]!r}")
        else:
            pieces = render(
                messages,
                tools,
                dialect=self.dialect,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=enable_thinking,
                clear_thinking=clear_thinking,
                reasoning_effort=reasoning_effort,
            )
        chat = RenderedChat(pieces)
        if not tokenize:
            return chat
        if return_dict:
            one = self([chat], return_tensors=return_tensors)
            return one if return_tensors else BatchEncoding({k: v[0] for k, v in one.items()})
        ids = self.encode(chat)
        return ids if return_tensors is None else _tensor([ids], return_tensors)

    def _own_pieces(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        options: Mapping[str, Any],
    ) -> list[Piece]:
        source = str(Path(self.source).with_name(TEMPLATE_FILE))
        template = self.tool_template if tools and self.tool_template is not None else self.chat_template
        if template is None:
            raise TemplateError(f"{source}: there is no chat template; pass dialect= ({', '.join(DIALECTS)})")
        named = {
            f"{kind}_token": _token_name(self.config.get(f"{kind}_token")) for kind in ("bos", "eos", "pad")
        }
        refused = next((name for name in _NOT_SUPPORTED if options.get(name)), None)
        if refused is not None:
            raise TemplateError(f"apply_chat_template: {refused} is not supported; leave it out")
        given = {key: value for key, value in named.items() if value}
        given |= {key: value for key, value in options.items() if value is not None}
        return render_own(template, messages, tools, given, control_tokens=self.control_ids, source=source)


class StreamDecoder:
    """Decodes one sequence an id at a time, giving out whole characters only.

    Bytes of an unfinished character wait for the next id. The parts given out add up to exactly
    `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that became certain with this id; often one word, sometimes nothing."""
        data = self._tokenizer.token_bytes(token_id, skip_special_tokens=self._skip)
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The rest at the end of the sequence: U+FFFD if a character never got finished."""
        return self._utf8.decode(b"", final=True)


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of the byte-level alphabet (GPT-2): printable Latin-1 is itself."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + n): byte for n, byte in enumerate(others)})
    return alphabet


_BYTE_OF = _byte_alphabet()


def _without_added_tokens(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same BPE (shared, not copied) that knows no control tokens.

    `encode_special_tokens` of `tokenizers` would not do: it leaves out only tokens flagged
    special, and published GLM files flag <think> and <tool_call> otherwise.
    """
    import tokenizers

    plain = tokenizers.Tokenizer(backend.model)
    if backend.normalizer is not None:
        plain.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        plain.pre_tokenizer = backend.pre_tokenizer
    return plain


def _token_name(value: Any) -> str:
    """A token in tokenizer_config.json: its text, or an object that holds it."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _tensor(rows: list[list[int]], kind: str) -> torch.Tensor:
    if kind != "pt":
        raise TokenizerError(f"return_tensors must be 'pt' or None, not {kind!r}")
    if len({len(row) for row in rows}) > 1:
        raise TokenizerError("texts of different lengths make no tensor; pass padding=True")
    import torch

    return torch.tensor(rows, dtype=torch.int64)


def _named(configured: Any) -> dict[str, str]:
    """The templates of a list of named ones."""
    each = configured if isinstance(configured, list) else []
    pairs = [(t.get("name"), t.get("template")) for t in each if isinstance(t, dict)]
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}


def _thinks(path: Path) -> bool:
    """What config.json says under `glm5_chat`, a key of ours that other readers pass over."""
    try:
        raw = read_json(path, error=TokenizerError).get("glm5_chat")
    except TokenizerError:  # a tokenizer may come without a model
        return True
    return not (isinstance(raw, Mapping) and raw.get("enable_thinking") is False)


def _refuse_what_aborts(path: Path, text: str) -> None:
    """`tokenizers` 0.22 ends the process where merges do not fit an affix; no byte-level BPE has one."""
    try:
        model = json.loads(text).get("model")
    except (ValueError, RecursionError, AttributeError):
        return  # it says itself what is wrong
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if isinstance(model, dict) and model.get(key):
            raise TokenizerError(f"{path}: model.{key} is {model[key]!r}; GLM's byte-level BPE has none")


def _read_config(path: Path) -> dict[str, Any]:
    return read_json(path, limit=_MAX_BYTES[CONFIG_FILE], error=TokenizerError) if path.exists() else {}


def _read_template(path: Path, configured: Any) -> str | None:
    """The chat template: its own file first, else the one in tokenizer_config.json."""
    if path.exists():
        return read_text(path, limit=_MAX_BYTES[TEMPLATE_FILE], error=TokenizerError)
    if isinstance(configured, list):  # named templates, an older habit
        named = _named(configured)
        configured = named.get("default")
        if configured is None and named:
            names = ", ".join(sorted(str(name) for name in named))
            raise TokenizerError(
                f"{path.with_name(CONFIG_FILE)}: chat_template has {names} and no default; "
                f"write the one that is wanted to {TEMPLATE_FILE}"
            )
    if configured is not None and not isinstance(configured, str):
        raise TokenizerError(f"{path.with_name(CONFIG_FILE)}: chat_template must be a string")
    return configured
