"""Images in tar archives: read where they lie, streamed where they do not."""
