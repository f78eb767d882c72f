"""The trained model as files that other programs load."""
