"""Embedding of texts in batches, with a cache."""
