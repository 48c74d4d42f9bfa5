"""What each kind of ATen operator does to boxes of pixels, to energies and to what positions have in common."""
