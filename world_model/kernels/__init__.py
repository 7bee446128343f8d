"""Passes of the transformer that are compiled for this machine's CPU."""
