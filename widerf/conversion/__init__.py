"""A whole model to sparse convolutions and back."""
