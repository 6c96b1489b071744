"""The methods that are compared: one file each, and one line each in `table.py`."""
