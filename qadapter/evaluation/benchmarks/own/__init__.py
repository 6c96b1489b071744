"""Benchmarks of the user's own: a file of questions, read, checked and asked."""
