"""Training: the config, the loop, one step, losses, schedules, logs; from the command line and in Python."""

from dgunet._moved import former_names
from dgunet.training.run import Trained, train

__all__ = ["Trained", "train"]

__getattr__ = former_names(__name__)
