"""The project's own benchmarks: one folder each, and a line in `table` for those whose items are generated."""
