"""Concepts: the latents that bear on what the student says next, token by token and row by row."""
