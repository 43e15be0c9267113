"""Published collections as they lie on disk, one file a layout."""
