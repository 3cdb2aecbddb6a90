"""Images: where they come from, the order they are read in, and the processes that read them."""
