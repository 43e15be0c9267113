"""Scores of the tasks: one file a task."""
