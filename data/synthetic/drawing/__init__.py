"""What is drawn of the synthetic world: ground, sky and what stands between, through a camera."""
