"""Models, tasks, data and training recipes."""
