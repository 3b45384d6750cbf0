"""Embedding: a sentence vector of each row, for the mixture's transport."""
