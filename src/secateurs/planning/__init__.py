"""What a run costs before it is run: memory, disk and time, from a configuration alone."""
