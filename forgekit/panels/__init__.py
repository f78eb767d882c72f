"""Panels: views on a run for a person at a notebook, made of plain ipywidgets. None of them is needed for Run All."""
