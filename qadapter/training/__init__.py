"""Training: the base model, the Q-Adapter and the baselines it is compared with."""
