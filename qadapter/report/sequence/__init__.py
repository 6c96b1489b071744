"""The report of a sequence of preferences."""
