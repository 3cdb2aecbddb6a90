"""Named configurations, read as package resources; nothing here is imported for code."""
