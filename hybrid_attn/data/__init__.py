"""From text files to a token store, and from documents to global batches."""
