"""The training run: steps, checkpoints, resuming, logs."""
