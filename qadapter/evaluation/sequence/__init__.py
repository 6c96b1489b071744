"""Preferences one after the other: what a policy still has of each, and the weights of several adapters."""
