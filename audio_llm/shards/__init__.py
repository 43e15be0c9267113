"""WebDataset shards: sample schema, writer, index, resumable reader."""
