"""Milliseconds of a network under a mask, from those of its layers by their widths."""
