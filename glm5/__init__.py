"""GLM-5-family sparse language models: train, run and inspect them on the machines people have."""
