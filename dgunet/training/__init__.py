"""Training: the config, the loop, one step, losses, schedules, logs, and the tasks' command line."""
