"""Processes, hardware, files and errors: what all other rooms stand on."""
