"""Several processes: who they are, what they agree on, signals, SLURM."""
