"""Words in, words out: questions become prompts, replies are read."""
