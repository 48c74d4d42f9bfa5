"""A whole network in one call: what its layers see, and what to do about it."""
