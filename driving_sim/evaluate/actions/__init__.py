"""Measure from the pictures of rollouts how well the rollouts obey their commands."""
