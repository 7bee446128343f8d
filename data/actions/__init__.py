"""Action files: speed and steering over time, brought to the frames."""
