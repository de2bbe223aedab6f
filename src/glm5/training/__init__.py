"""Training: a recipe in TOML, corpora to shards, losses, optimizers and the loop.

Resuming gives the losses of a run that never stopped; nothing is pickled.
"""
