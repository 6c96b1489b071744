"""lm-eval: which tasks there are, how they are asked of a policy, what they read."""
