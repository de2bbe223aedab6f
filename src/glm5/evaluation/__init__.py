"""Scores of a model, and what a change of its weights did to its answers."""
