"""The model: encoder contract, projector, the Transformers classes, checkpoint folders."""
