"""The trainer and what it reports."""
