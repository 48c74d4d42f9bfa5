"""The main job: does widening make training faster, and the ERF wider? ``python -m experiments.compare``."""
