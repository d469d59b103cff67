"""Text files to a token store, and documents to global batches."""
