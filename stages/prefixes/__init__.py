"""Prefixes: the first tokens of a model's own solution to each row's prompt, to be trained on."""
