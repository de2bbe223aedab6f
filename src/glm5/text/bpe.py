"""Trains a byte-level BPE with the GLM pre-tokenizer and the GLM control tokens."""

from __future__ import annotations

from collections.abc import Iterable

from glm5.errors import TokenizerError
from glm5.text.chat.template import default_template
from glm5.text.control_tokens import ENDOFTEXT, SPECIAL_TOKENS
from glm5.text.split import GLM_SPLIT
from glm5.text.tokenizer import Tokenizer

# As in the published files: control tokens that a decoder shows.
_SHOWN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
          "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")  # fmt: skip


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` entries, control tokens last.

    Raises TokenizerError when the text is too little for that many merges.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(GLM_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    found = backend.get_vocab_size() + len(SPECIAL_TOKENS)
    if found != vocab_size:
        raise TokenizerError(
            f"the text gives {found} entries, tokenizer.vocab_size asks for {vocab_size}; "
            f"give more text, or --set tokenizer.vocab_size={found}"
        )
    backend.add_tokens(
        [
            tokenizers.AddedToken(token, special=token not in _SHOWN, normalized=False)
            for token in SPECIAL_TOKENS
        ]
    )
    config = {"eos_token": ENDOFTEXT, "pad_token": ENDOFTEXT}
    return Tokenizer(backend, config=config, chat_template=default_template())
