"""Prefect flows: which stage feeds which."""
