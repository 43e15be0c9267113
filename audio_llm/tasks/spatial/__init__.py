"""Which sound, where and how far: the task of Spatial-AST."""
