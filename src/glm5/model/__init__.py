"""The network in plain PyTorch: the same modules train, evaluate and generate.

Imports nothing of glm5 but the configuration. Caches, ranks and quantized weights are put in from
outside.
"""
