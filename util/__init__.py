"""Small single-purpose helpers. Nothing in here imports `masking`, a model, an engine or a main."""
