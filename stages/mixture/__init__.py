"""Mixture stage: how much of every source to take, by optimal transport to a target sample."""
