"""What people start: the `dgunet` command, the demo, export, figures."""
