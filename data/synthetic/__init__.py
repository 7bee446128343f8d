"""The synthetic world: driving video with exact actions, and the true future of any action."""
