"""Texts to vectors, in batches, with a cache."""
