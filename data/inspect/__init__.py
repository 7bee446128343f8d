"""Inspect folders of drives: show what they contain and what is wrong."""
