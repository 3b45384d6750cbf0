"""Selection: the only stage that drops rows, each with a reason."""
