"""What a report holds, how it is read and written, and how two of them compare."""
