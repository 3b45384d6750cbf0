"""Thinking: whether an adaptive-thinking model would think about a row's prompt."""
