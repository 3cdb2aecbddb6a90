"""Number formats written into the graph itself: FP16 and INT8 that every runtime reads alike."""
