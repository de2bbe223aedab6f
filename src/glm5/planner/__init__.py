"""What a model takes: bytes of weights, of caches and of work, counted in one place from headers."""
