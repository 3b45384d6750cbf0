"""Runs as jobs of a Ray cluster, over the REST interface of its dashboard."""
