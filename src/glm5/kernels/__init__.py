"""What PyTorch lacks: products with int4, int8 and FP8 weights straight from the checkpoint's layout.

`cpu` is the native library; `reference` says in plain PyTorch what every kernel computes.
"""
