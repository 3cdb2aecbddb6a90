"""Files that are whole or absent, and documents that are checked."""
