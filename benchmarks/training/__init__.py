"""Benchmarks and costs of training."""
