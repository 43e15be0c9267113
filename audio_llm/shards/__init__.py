"""WebDataset shards: sample schema, writer, index, reader."""
