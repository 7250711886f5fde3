"""Training: the config, the loop, one step, losses, schedules, logs; from the command line and in Python."""

from dgunet.training.run import Trained, train

__all__ = ["Trained", "train"]
