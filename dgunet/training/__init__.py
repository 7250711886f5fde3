"""Training: the config, the loop, one step, losses, schedules, logs, and the tasks' command line."""

from dgunet._moved import former_names

__getattr__ = former_names(__name__)
