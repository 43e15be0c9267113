"""Everything that asks a model a question."""
