"""Compiled kernels of the sparse convolution, and the choice between them."""
