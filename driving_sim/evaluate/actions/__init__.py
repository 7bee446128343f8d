"""Whether a rollout does what it is told: commands against what the pictures show."""
