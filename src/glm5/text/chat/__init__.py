"""Conversations as prompts: the published formats, and a sandbox for unknown templates."""
