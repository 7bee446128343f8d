"""Benchmarks of reading videos, and of reading and writing token stores."""
