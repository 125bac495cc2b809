"""Convert checkpoints for other libraries, and theirs for this project."""
