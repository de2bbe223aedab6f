"""The Triton programs themselves; the files above launch them."""
