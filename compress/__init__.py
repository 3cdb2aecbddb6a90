"""Make trained convolutional networks small and fast, and prove it."""
