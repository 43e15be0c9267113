"""Training data of the tasks: one file a task."""
