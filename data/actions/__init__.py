"""Read action files (speed and steering over time), and align them with frames."""
