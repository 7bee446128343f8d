"""Tokens drawn from what the model says, wave by wave."""
