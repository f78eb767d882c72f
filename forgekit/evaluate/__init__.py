"""Answers of the model, and how they score on rows it has not learned from."""
