"""What a policy learnt and what it kept: measures, statistics, benchmarks."""
