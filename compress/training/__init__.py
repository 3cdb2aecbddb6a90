"""Training a network, dense or pruned, and telling how good it is."""
