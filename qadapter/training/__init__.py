"""Training: the base model, the Q-Adapter and the baselines it is compared with."""

from qadapter.config.trackers import look_before_trl

look_before_trl()  # TRL imports trackers that are installed, and a broken one would break every training
