"""Explanations: the latents that made rows similar to the targets, and where they are active."""
