"""TensorRT engines: whether one can be built here, building it, and what is known of it."""
