"""Notebooks without a browser, and what they tell when they end."""
