"""A run and its directory: history, state to go on from, curves, the lock."""
