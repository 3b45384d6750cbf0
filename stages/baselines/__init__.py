"""Baselines: the scores that any selection should be compared with."""
