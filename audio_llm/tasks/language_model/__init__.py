"""A small language model from the text of a corpus."""
