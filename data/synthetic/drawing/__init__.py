"""Draws the synthetic world as a camera sees it: ground, sky and the things on the ground."""
