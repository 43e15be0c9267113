"""Ways to look: at shards, at a rendered prompt, at the machine."""
