"""Training a world model: its objective, its data, its presets and its validation."""
