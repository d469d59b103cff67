"""Pretraining of long-context language models whose layers alternate local and global attention."""
