"""Rows of any shape to checked examples, and examples to batches."""
