"""Evaluation of adaptation and retention: measures, statistics, benchmarks."""
