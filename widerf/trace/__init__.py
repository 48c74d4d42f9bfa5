"""What one forward pass did: the layer that makes the map, every operator on the way, the model left as it was."""
