"""Does a pattern beat the grid? ``python -m experiments.patterns``."""
