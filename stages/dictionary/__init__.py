"""Sparse autoencoders: the model, its training and its checkpoint format."""
