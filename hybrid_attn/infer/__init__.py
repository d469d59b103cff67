"""Answers of a model: its caches, how they are filled and read, and the tokens that are chosen."""
