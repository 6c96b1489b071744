"""Evaluation: what a policy learnt (adaptation) and what it forgot (retention)."""
