"""Judges of a policy's answers: one file per judge, one line per judge in `table`."""
