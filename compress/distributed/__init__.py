"""Many processes as one."""
