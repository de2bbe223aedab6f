"""The tokenizer files of a checkpoint directory, rebuilt from the vocabulary that a GGUF file carries.

Knows byte-level BPE (`tokenizer.ggml.model` = gpt2) with the splits of GLM, and of SmolLM2 and GPT-2
for comparison. What GGUF does not say (a token's stripping of blanks, post-processing) stays unset,
as it is in the published GLM files.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NamedTuple

from glm5.checkpoint.gguf.file import GgufFile
from glm5.disk.safetensors_file import shown
from glm5.errors import CheckpointError
from glm5.text.split import GLM_SPLIT


class _Split(NamedTuple):
    """How text is cut before merging. `regex` None is GPT-2's, which the library has built in."""

    regex: str | None = None
    single_digits: bool = False
    whole_words: bool = False  # a piece that is a token itself is not merged (`ignore_merges`)


# By `tokenizer.ggml.pre` (llama-vocab.cpp, tokenizer_pre).
_SPLITS = {
    "glm4": _Split(GLM_SPLIT, whole_words=True),
    "glm5": _Split(GLM_SPLIT, whole_words=True),
    "chatglm-bpe": _Split(GLM_SPLIT),
    "smollm": _Split(single_digits=True),
    "gpt-2": _Split(),
}
# `tokenizer.ggml.token_type` (llama_token_type)
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
_MODEL_MAX_LENGTH = 202752


def tokenizer_files(file: GgufFile) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and, if the file has one, chat_template.jinja.

    Raises:
        CheckpointError: the vocabulary is missing, contradicts itself or is not a byte-level BPE
            that glm5 knows; the message names the key.
    """
    specials = _special_tokens(file)
    found = {"tokenizer.json": _tokenizer_json(file, specials)}
    length = file.metadata.get(f"{file.architecture}.context_length")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": length if type(length) is int else _MODEL_MAX_LENGTH,
    }
    tokens = _tokens(file)
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        if key in specials:
            config[f"{name}_token"] = tokens[specials[key]]
    found["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode("utf-8")
    template = file.metadata.get("tokenizer.chat_template")
    if template is not None:
        if not isinstance(template, str):
            raise _refusal(file, "chat_template", "is not text")
        found["chat_template.jinja"] = template.encode("utf-8")
    return found


def _tokenizer_json(file: GgufFile, specials: dict[str, int]) -> bytes:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    split = _split(file)
    tokens, kinds = _tokens(file), _kinds(file)
    vocabulary = {token: i for i, token in enumerate(tokens) if kinds[i] != _UNUSED}
    if len(vocabulary) + kinds.count(_UNUSED) != len(tokens):
        used = Counter(token for token, kind in zip(tokens, kinds, strict=True) if kind != _UNUSED)
        raise _refusal(file, "ggml.tokens", f"holds {shown(used.most_common(1)[0][0])} twice")
    try:
        model = models.BPE(vocab=vocabulary, merges=_merges(file), ignore_merges=split.whole_words)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is not an Exception
        reason = " ".join(str(error).split())[:200]
        raise _refusal(file, "ggml.merges", f"does not fit the vocabulary: {shown(reason)}") from None
    backend = tokenizers.Tokenizer(model)
    steps: list[Any] = []
    if split.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split.regex is not None:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(split.regex), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.regex is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    control = {specials[key] for key in ("bos", "eos", "eot", "eom", "padding") if key in specials}
    backend.add_tokens(
        [
            tokenizers.AddedToken(token, special=kinds[i] != _USER_DEFINED, normalized=False)
            for i, token in enumerate(tokens)
            if token and (kinds[i] in (_CONTROL, _USER_DEFINED) or (i in control and kinds[i] != _UNUSED))
        ]
    )
    text: str = backend.to_str()
    return text.encode("utf-8")


# --- keys, checked ------------------------------------------------------------------------------


def _refusal(file: GgufFile, key: str, what: str) -> CheckpointError:
    return CheckpointError(f"{file.path}: key tokenizer.{key} {what}; use another copy")


def _split(file: GgufFile) -> _Split:
    model = file.metadata.get("tokenizer.ggml.model")
    if model is None:
        raise _refusal(file, "ggml.model", "is missing: the file has no vocabulary")
    if model != "gpt2":
        raise _refusal(file, "ggml.model", f"is {str(model)[:60]!r}; glm5 reads byte-level BPE, 'gpt2'")
    pre = file.metadata.get("tokenizer.ggml.pre")
    if not isinstance(pre, str) or pre not in _SPLITS:
        raise _refusal(file, "ggml.pre", f"is {str(pre)[:60]!r}; glm5 knows {', '.join(_SPLITS)}")
    return _SPLITS[pre]


def _texts(file: GgufFile, key: str) -> list[str]:
    value = file.metadata.get(f"tokenizer.{key}")
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise _refusal(file, key, "is missing or not a list of texts")
    return value  # type: ignore[return-value]


def _tokens(file: GgufFile) -> list[str]:
    return _texts(file, "ggml.tokens")


def _merges(file: GgufFile) -> list[tuple[str, str]]:
    merges = []
    for merge in _texts(file, "ggml.merges"):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise _refusal(file, "ggml.merges", f"has an entry {merge[:60]!a} that is not two tokens")
        merges.append((left, right))
    return merges


def _kinds(file: GgufFile) -> list[int]:
    count = len(_tokens(file))
    kinds = file.metadata.get("tokenizer.ggml.token_type", [1] * count)
    if not isinstance(kinds, list) or len(kinds) != count or not all(type(kind) is int for kind in kinds):
        raise _refusal(file, "ggml.token_type", f"is not a list of {count} numbers, one a token")
    return kinds  # type: ignore[return-value]


def _special_tokens(file: GgufFile) -> dict[str, int]:
    """Ids by what the file uses them for: eos, eot, eom, bos, unknown, padding."""
    count, found = len(_tokens(file)), {}
    for name in ("eos", "eot", "eom", "bos", "unknown", "padding"):
        token = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token is None:
            continue
        if type(token) is not int or not 0 <= token < count:
            raise _refusal(file, f"ggml.{name}_token_id", f"is not an id below {count}")
        found[name] = token
    return found
