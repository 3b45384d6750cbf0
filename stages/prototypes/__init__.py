"""Prototypes: what the targets activate, and how often latents are active at all."""
