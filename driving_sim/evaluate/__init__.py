"""Evaluate trained models on held-out drives: the functions behind `drivesim evaluate`."""
