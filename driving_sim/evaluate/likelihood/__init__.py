"""Measure in bits how well a world model predicts held-out drives."""
