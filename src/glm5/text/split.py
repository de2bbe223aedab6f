"""How GLM cuts text before it merges bytes."""

# Contractions, words with one leading mark, digits in groups of 1-3, punctuation runs, line ends:
# the split of GLM-4 and GLM-5 (`LLAMA_VOCAB_PRE_TYPE_CHATGLM4` in llama.cpp).
GLM_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
