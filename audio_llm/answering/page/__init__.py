"""The page of ``audio-llm demo``: a sound is seen, a model is asked about it, and asked again without it."""
