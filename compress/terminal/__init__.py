"""What people see and press: results, progress, tables, signals."""
