"""Speed as a ratio to a named rival in the same run: ``python -m experiments.bench``."""
