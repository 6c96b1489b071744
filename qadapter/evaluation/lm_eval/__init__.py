"""lm-eval: the available tasks, how a policy is evaluated on them, and what they read."""
