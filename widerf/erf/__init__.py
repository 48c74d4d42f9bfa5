"""The effective receptive field: the object, and the roads to it (prediction, measurement, tracking)."""
