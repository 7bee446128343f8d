"""Learn a driving simulator from driving video, then drive in it."""
