"""What an encoder learns by itself: one folder a task, and what they share."""
