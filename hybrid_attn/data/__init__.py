"""Text files to global batches: tokenizer, documents, rows, pipeline."""
