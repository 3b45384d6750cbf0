"""Allocation: a budget of further rollouts, spent where it lowers the gradient's variance most."""
