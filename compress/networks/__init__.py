"""Networks: how they are built, which channels belong together, and how they get smaller."""
