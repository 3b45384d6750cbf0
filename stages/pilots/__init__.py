"""Pilots: small language models trained on a design of mixtures, and what they lose on targets."""
