"""Text to fixed-length rows, and rows to batches."""
