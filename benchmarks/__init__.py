"""Speed and memory against the published code's way, TRL and plain LoRA; `python -m benchmarks.<name> --help`."""
