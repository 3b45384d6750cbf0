"""Difficulty groups and costs from pass rates: analyses of rows that several models have tried."""
