"""Many headless runs from one file: which points, in which order, on which machines."""
