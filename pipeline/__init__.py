"""The application: how stages are configured, run, resumed and reported."""

__version__ = "0.1.0"
