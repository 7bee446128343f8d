"""Measurements of trained models on drives that they have not seen: `drivesim evaluate`."""
