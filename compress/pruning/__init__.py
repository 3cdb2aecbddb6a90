"""Which channels go, and when."""
