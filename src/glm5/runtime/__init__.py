"""Generation: caches, sampling, decoding, speculation, and the model that people hold."""
