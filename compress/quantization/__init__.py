"""Training with the rounding of 8-bit kernels, at the places and with the scales of a plan."""
