"""From text to batches of tokens: sources, readers, shards on disk, splits and loaders."""
