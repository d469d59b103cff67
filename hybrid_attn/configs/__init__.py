"""The config that all others start from; those of published models and of the paper are in configs/ of the repository."""
