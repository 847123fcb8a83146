"""Text to batches of token ids: corpora of any size, streams, many workers."""
