"""Training a world model: what for, on what, and how it is judged meanwhile."""
