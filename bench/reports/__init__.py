"""What a report holds, how it is built, written and read, and what it says first."""
