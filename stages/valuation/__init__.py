"""Valuation: what each row adds to the nearness of the pool, or of a selection, to the targets."""
