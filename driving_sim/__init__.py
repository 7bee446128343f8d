"""Train a driving simulator on driving video, then drive in it."""
