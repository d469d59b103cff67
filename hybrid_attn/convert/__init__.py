"""Checkpoints in other formats: `families` is the table of model families, `hf` reads and writes their directories."""
