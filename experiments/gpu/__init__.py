"""What only a machine with a GPU can say: ``python -m experiments.gpu kernels`` (``make gpu``)."""
