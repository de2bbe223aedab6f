"""The control tokens of the GLM family, in the order of their ids.

Every GLM-4.5 to GLM-5.x tokenizer keeps this order; only the first id differs (151329 in
GLM-4.5..4.7, 154820 from GLM-4.7-Flash on). Ids are always read from a checkpoint's own
`tokenizer.json`; this list is what our own tokenizers are trained with.
"""

from __future__ import annotations

ENDOFTEXT = "<|endoftext|>"
GMASK = "[gMASK]"
SOP = "<sop>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
OBSERVATION = "<|observation|>"
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"

SPECIAL_TOKENS: tuple[str, ...] = (
    ENDOFTEXT,
    "[MASK]",
    GMASK,
    "[sMASK]",
    SOP,
    "<eop>",
    SYSTEM,
    USER,
    ASSISTANT,
    OBSERVATION,
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|begin_of_audio|>",
    "<|end_of_audio|>",
    "<|begin_of_transcription|>",
    "<|end_of_transcription|>",
    "<|code_prefix|>",
    "<|code_middle|>",
    "<|code_suffix|>",
    THINK_OPEN,
    THINK_CLOSE,
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
)

# A turn ends when the model writes one of these (eos_token_id of every release).
EOS_TOKENS: tuple[str, ...] = (ENDOFTEXT, USER, OBSERVATION)
