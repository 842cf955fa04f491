"""Metrics of the tasks: per clip a number, or the reason why there is none (see evaluation/figures.py)."""
