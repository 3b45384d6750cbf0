"""Forecasts of a target's loss from a mixture: forms, their fits, the projection to a budget."""
