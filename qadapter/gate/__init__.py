"""The promotion gate: its rules, what it compares, its decisions, and the watch over a champion."""
