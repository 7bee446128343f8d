"""Fit a scaling law to small training runs, report it and plot it."""
