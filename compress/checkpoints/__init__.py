"""Files of weights: what they hold, and the network that each one describes."""
